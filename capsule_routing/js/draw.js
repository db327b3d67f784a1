// The page `Draw`: a canvas, and what the network makes of it. The network itself is `capsnet.js`,
// asked as a worker; the markup is `draw.html`, already in the element's shadow root.

const SIDE = 28, PAD = 280, PEN = 0.085;              // pixels; pen as a share of the drawing area
const LESSONS = ["squash", "decoder", "layers", "routing", "explore", "visualize"];
export const make = (tag, given = {}, parent = null) => {
  const el = Object.assign(document.createElement(tag), given);
  if (parent) parent.append(el);
  return el;
};
export const signed = v => (v.toFixed(2) === "0.00" || v.toFixed(2) === "-0.00" ? "" : v < 0 ? "−" : "+") + Math.abs(v).toFixed(2);
// 16-bit floats, little-endian, of normal size, as stored answers have them
export function halves(bytes) {
  const view = new DataView(bytes.buffer), out = new Float32Array(bytes.length/2);
  for (let k = 0; k < out.length; k++) {
    const h = view.getUint16(2*k, true), e = (h >> 10) & 31, f = h & 1023;
    out[k] = (h >> 15 ? -1 : 1) * (e ? (1 + f/1024) * 2**(e - 15) : f * 2**-24);
  }
  return out;
}
export const bytes64 = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

// The worker: `ask(message)` is a promise of the answer, `heard(id, got)` tells how far a file is
export function connect(url) {
  const worker = new Worker(url, {type: url.startsWith("blob:") ? "classic" : "module"}), waiting = new Map();
  let n = 0;
  worker.onmessage = ({data: {id, done, failed, got}}) => {
    const {yes, no, heard} = waiting.get(id);
    if (got !== undefined) return heard && heard(got);
    waiting.delete(id);
    if (failed === undefined) yes(done); else no(new Error(failed));
  };
  worker.onerror = e => waiting.forEach(({no}) => no(new Error(e.message || "the worker could not start")));
  return (message, heard = null, transfer = []) => new Promise((yes, no) => {
    waiting.set(++n, {yes, no, heard});
    worker.postMessage({id: n, ...message}, transfer);
  });
}

// Grey pixels `(side, side)` in [0, 1], or of 255, onto a canvas; two lists give two colours
export function show(canvas, one, scale = 1, two = null) {
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d"), image = context.createImageData(SIDE, SIDE);
  for (let k = 0; k < SIDE*SIDE; k++) {
    const a = one ? one[k]/scale : 0, b = two ? two[k]/scale : 0;
    const rgb = two ? [a*255 + b*40, a*150 + b*150, a*40 + b*255] : [a*255, a*255, a*255];
    rgb.forEach((v, s) => { image.data[4*k + s] = Math.min(255, Math.round(v)); });
    image.data[4*k + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

// Primary capsules on their grid, `types` at each place in cells of `across` columns
function drawGrid(canvas, colour, {rows, cols, types}, at) {
  const across = Math.ceil(Math.sqrt(types*2)), down = Math.ceil(types/across), size = 480;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), cw = size/cols, ch = size/rows, gap = 5;
  for (let y = 0; y < rows; y++) for (let x = 0; x < cols; x++) for (let t = 0; t < types; t++) {
    const w = (cw - gap)/across, h = (ch - gap)/down;
    context.fillStyle = colour((t*rows + y)*cols + x);
    context.fillRect(x*cw + gap/2 + (t % across)*w, y*ch + gap/2 + Math.floor(t/across)*h, w - 0.8, h - 0.8);
  }
  context.lineWidth = 3;
  context.strokeStyle = "#ffd166";
  context.strokeRect(at.x*cw + 1.5, at.y*ch + 1.5, cw - 3, ch - 3);
}

// "ink +12%": what a moved slider did, in words
export function inkChange(before, after) {
  const sum = x => x.reduce((a, b) => a + b, 0), more = 100*(sum(after)/sum(before) - 1);
  return `ink ${more < 0 ? "−" : "+"}${Math.abs(more).toFixed(0)}%`;
}

export function start(root, config) {
  const $ = id => root.getElementById(id), {names, header} = config, sizes = header.sizes;
  const MOST = Math.max(5, sizes.n_iters);              // routing iterations to choose from
  const layers = sizes.layers.length, classes = names.length, grid = {rows: sizes.grid[0], cols: sizes.grid[1], types: sizes.n_types};
  const ask = connect(config.worker), host = root.host;
  const state = {marks: [], past: [], picture: null, result: null, kind: 0, step: sizes.n_iters,
                 iterations: sizes.n_iters, at: {x: 2, y: 2}, added: new Array(sizes.dims).fill(0), times: []};
  let ready = null, busy = false, again = false, playing = null;
  host.capsules = {ask, state, load};

  // -- the network's files, once --

  function load() {
    if (ready) return ready;
    const total = Object.values(header.bytes).reduce((a, b) => a + b), got = {};
    const tell = part => n => {
      got[part] = n;
      const share = Math.min(1, Object.values(got).reduce((a, b) => a + b, 0)/total);
      $("progress").value = share;
      $("loading").textContent = `the network comes: ${(share*total/1e6).toFixed(1)} of ${(total/1e6).toFixed(1)} MB, once`;
    };
    $("load").hidden = false;
    tell("decoder")(0);
    const parts = Object.entries(config.files).map(([load, from]) => ask({load, header, from}, tell(load)));
    ready = Promise.all(parts).then(() => { $("load").hidden = true; host.dataset.ready = "yes"; });
    ready.catch(error => {
      $("loading").textContent = `The network could not be fetched (${error.message}). Draw again to try once more.`;
      ready = null;
    });
    return ready;
  }

  // -- the drawing --

  const ink = new OffscreenCanvas(PAD, PAD).getContext("2d", {willReadFrequently: true});
  function paintMarks(context, side, colour) {
    context.clearRect(0, 0, side, side);
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = context.fillStyle = colour;
    for (const mark of state.marks) {
      if (mark.picture) { context.drawImage(mark.picture, 0, 0, side, side); continue; }
      context.lineWidth = PEN*side;
      context.beginPath();
      mark.forEach(([x, y], k) => k ? context.lineTo(x*side, y*side) : context.moveTo(x*side, y*side));
      if (mark.length === 1) context.lineTo(mark[0][0]*side + 0.01, mark[0][1]*side);
      context.stroke();
    }
  }
  function showPad() {
    const pad = $("pad"), side = Math.max(2*PAD, Math.round(pad.clientWidth*devicePixelRatio));
    if (pad.width !== side) pad.width = pad.height = side;
    paintMarks(pad.getContext("2d"), side, "#fff");
    $("undo").disabled = !state.past.length;
    $("clear").disabled = !state.marks.length;
  }
  function readInk() {
    paintMarks(ink, PAD, "#fff");
    const {data} = ink.getImageData(0, 0, PAD, PAD), out = new Float64Array(PAD*PAD);
    for (let k = 0; k < out.length; k++) out[k] = data[4*k + 3]/255;
    return out;
  }
  function change(marks, remember = true) {
    if (remember) state.past.push(state.marks);
    state.marks = marks;
    refresh();
  }
  // A picture of 784 bytes as a mark: the network sees it as it is, if nothing else is drawn
  function pictureMark(bytes) {
    const canvas = new OffscreenCanvas(SIDE, SIDE), context = canvas.getContext("2d");
    const image = context.createImageData(SIDE, SIDE);
    bytes.forEach((v, k) => image.data.set([255, 255, 255, v], 4*k));
    context.putImageData(image, 0, 0);
    return {picture: canvas, bytes};
  }

  // -- from the drawing to everything that is shown --

  function refresh() {
    showPad();
    state.added.fill(0);                                   // now: what is moved from here on belongs to the new drawing
    if (busy) again = true; else look();
  }
  async function look() {
    const began = performance.now();
    busy = true;
    try {
      const [only] = state.marks;
      const picture = state.marks.length === 1 && only.bytes ? only.bytes : await ask({fit: readInk(), h: PAD, w: PAD});
      const empty = !picture.some(v => v);
      if (!empty) await load();
      const result = empty ? null : await ask({look: picture, iterations: MOST});
      Object.assign(state, {picture, result});
      if (result) state.kind = order()[0];
      state.step = state.iterations;
      await showAll();
      if (result) state.times.push(performance.now() - began);
    } catch (error) { console.warn(error); }
    busy = false;
    if (again) { again = false; look(); }
  }
  const now = () => state.result.steps[state.iterations - 1];
  const order = () => [...now().lengths.keys()].sort((a, b) => now().lengths[b] - now().lengths[a]);
  const pose = j => now().v.slice(j*sizes.dims, (j + 1)*sizes.dims);
  async function paint(j, moved = null) {
    const kept = state.result.paints && state.iterations === sizes.n_iters && state.result.paints[j];
    if (kept && !moved) return kept;                       // a stored answer, before the network is here
    await load();
    return ask({paint: moved || pose(j), j});
  }

  function says() {
    if (!state.result) return "Draw a digit.";
    const there = order().filter(j => now().lengths[j] >= 0.5);
    if (!there.length) return "No class is there.";
    if (there.length === 1) return `This is ${names[there[0]]}.`;
    return `Here are ${there.slice(0, -1).map(j => names[j]).join(", ")} and ${names[there[there.length - 1]]}.`;
  }

  async function showAll() {
    const {result} = state;
    $("says").textContent = says();
    root.querySelectorAll("[data-class]").forEach(el => { el.textContent = names[state.kind]; });
    [...$("bars").children].forEach((bar, j) => {
      const length = result ? now().lengths[j] : 0;
      bar.firstChild.style.setProperty("--length", length);
      bar.lastChild.textContent = result ? length.toFixed(2) : "";
      bar.setAttribute("aria-pressed", j === state.kind);
      bar.setAttribute("aria-label", `class ${names[j]}, length ${length.toFixed(2)}`);
    });
    showSeen();
    showMaps();
    showTable();
    await showPictures();
  }

  function showSeen() {
    const canvas = $("seen"), {x, y} = state.at;
    show(canvas, state.picture, 255);
    if (!state.result) return;
    const context = canvas.getContext("2d"), step = sizes.stride, field = sizes.kernel1 + sizes.kernel2 - 1;
    context.strokeStyle = "#ffd166";
    context.strokeRect(x*step + 0.5, y*step + 0.5, field - 1, field - 1);
  }

  async function showPictures() {
    const {result} = state;
    if (!result) { for (const id of ["first", "second", "both", "moved"]) show($(id), null); return showMoved(); }
    const [a, b] = order(), [one, two] = await Promise.all([paint(a), paint(b)]);
    if (state.result !== result) return;
    show($("first"), one);
    show($("second"), two);
    show($("both"), one, 1, two);
    const label = j => `${names[j]}, length ${now().lengths[j].toFixed(2)}`;
    $("first-says").textContent = `from ${label(a)}`;
    $("second-says").textContent = `from ${label(b)}`;
    $("both-says").textContent = "both, in two colours";
    await showMoved();
  }

  // -- the sixteen numbers --

  const rows = state.added.map((_, d) => {
    const row = make("div", {className: "slider"}, $("sliders"));
    make("label", {htmlFor: `dim-${d}`, textContent: d}, row);
    const input = make("input", {id: `dim-${d}`, type: "range", min: -config.reach, max: config.reach, step: config.step, value: 0}, row);
    const output = make("output", {}, row), hint = make("span", {id: `hint-${d}`}, row);
    output.htmlFor = input.id;
    input.setAttribute("aria-label", `dimension ${d}`);
    input.setAttribute("aria-describedby", hint.id);
    input.addEventListener("input", () => { state.added[d] = Number(input.value); showMoved(); });
    return {input, output, hint};
  });
  async function showMoved() {
    rows.forEach(({input, output, hint}, d) => {
      input.value = state.added[d];
      output.textContent = signed(state.added[d]);
      input.setAttribute("aria-valuetext", signed(state.added[d]));
      input.disabled = !state.result;
      hint.textContent = config.hints ? config.hints[state.kind][d] : "";
    });
    if (!state.result) return;
    const j = state.kind, {result} = state, still = state.added.every(v => v === 0);
    const moved = still ? null : pose(j).map((v, d) => v + state.added[d]);
    const [before, after] = await Promise.all([paint(j), paint(j, moved)]);
    if (state.result !== result || state.kind !== j) return;
    show($("moved"), after);
    $("moved-says").textContent = still ? "Nothing added yet." : inkChange(before, after);
  }
  $("reset").addEventListener("click", () => { state.added.fill(0); showMoved(); });

  // -- the maps --

  function showMaps() {
    const {result, kind, at} = state;
    const even = 1/classes, lengths = result && result.primary, step = result && result.steps[state.step - 1];
    drawGrid($("primary"), i => { const v = result ? Math.round(28 + 227*Math.min(1, lengths[i])) : 28; return `rgb(${v},${v},${Math.min(255, v + 8)})`; }, grid, at);
    const own = r => result.primary.map((_, i) => result.steps[r].c[i*classes + kind]).sort();
    const few = Math.floor(0.005*grid.rows*grid.cols*grid.types), span = c => [c[few], c[c.length - 1 - few]];
    const far = result && layers === 1 ? Math.max(0.01, ...span(own(state.iterations - 1)).map(v => Math.abs(v - even))) : 1;
    const mix = (a, b, k) => a.map((v, s) => Math.round(v + k*(b[s] - v)));
    drawGrid($("coupling"), i => {
      const k = result ? (step.c[i*classes + kind] - even)/far : 0;
      return `rgb(${mix([40, 47, 58], k < 0 ? [61, 139, 240] : [255, 150, 50], Math.min(1, Math.abs(k))).join(",")})`;
    }, grid, at);
    if (result && layers === 1) {
      const c = own(state.step - 1), [low, high] = span(c).map(v => v.toFixed(3));
      $("range").textContent = `In this iteration 99 of 100 lie between ${low} and ${high}; the extremes are ${c[0].toFixed(3)} and ${c[c.length - 1].toFixed(3)}.`;
    }
    $("step").textContent = `iteration ${state.step} of ${state.iterations}`;
    $("back").disabled = state.step <= 1;
    $("on").disabled = state.step >= state.iterations;
    showPlace();
  }
  function showPlace() {
    const {result, at} = state, place = header.sizes.layers.length > 1 ? 0 : at.y*grid.cols + at.x;
    const sums = names.map((_, j) => result ? result.steps[state.step - 1].adds[place*classes + j] : 0);
    const most = Math.max(0.05, ...sums.map(Math.abs));
    [...$("place").children].forEach((row, j) => {
      row.classList.toggle("on", j === state.kind);
      row.children[1].classList.toggle("neg", sums[j] < 0);
      row.children[1].style.setProperty("--adds", sums[j]/most);
      row.children[2].textContent = result ? signed(sums[j]) : "";
    });
    $("where").textContent = `Row ${at.y + 1}, column ${at.x + 1}`;
  }
  function go(x, y) {
    const at = {x: Math.max(0, Math.min(grid.cols - 1, x)), y: Math.max(0, Math.min(grid.rows - 1, y))};
    if (at.x === state.at.x && at.y === state.at.y) return;
    state.at = at;
    showSeen();
    showMaps();
  }
  for (const id of ["primary", "coupling"]) {
    const point = e => { const b = $(id).getBoundingClientRect(); go(Math.floor((e.clientX - b.left)/b.width*grid.cols), Math.floor((e.clientY - b.top)/b.height*grid.rows)); };
    $(id).addEventListener("pointermove", point);
    $(id).addEventListener("pointerdown", point);
  }
  $("primary").addEventListener("keydown", e => {
    const [x, y] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[e.key] || [0, 0];
    if (x || y) { e.preventDefault(); go(state.at.x + x, state.at.y + y); }
  });

  // -- iterations --

  const stepTo = r => { state.step = r; showMaps(); };
  $("back").addEventListener("click", () => stepTo(state.step - 1));
  $("on").addEventListener("click", () => stepTo(state.step + 1));
  function stop() { clearInterval(playing); playing = null; $("play").textContent = "Play"; }
  $("play").addEventListener("click", () => {
    if (playing) return stop();
    stepTo(1);
    $("play").textContent = "Stop";
    playing = setInterval(() => state.step >= state.iterations ? stop() : stepTo(state.step + 1), 900);
  });
  for (let r = 1; r <= MOST; r++) {
    const label = make("label", {}, $("iterations"));
    const input = make("input", {type: "radio", name: "iterations", value: r, checked: r === state.iterations}, label);
    label.append(r + (r === sizes.n_iters ? " (as trained)" : ""));
    input.addEventListener("change", () => { state.iterations = state.step = r; if (state.result) showAll(); else showMaps(); });
    const row = make("tr", {}, $("table"));
    make("th", {scope: "row", textContent: r}, row);
    names.forEach(() => make("td", {}, row));
  }
  function showTable() {
    const {result} = state;
    [...$("table").children].forEach((row, r) => {
      row.classList.toggle("on", r + 1 === state.iterations);
      names.forEach((_, j) => {
        const cell = row.children[j + 1], length = result ? result.steps[r].lengths[j] : 0;
        cell.textContent = result ? length.toFixed(2) : "";
        cell.style.setProperty("--length", length);
      });
    });
    if (!result) { $("honest").textContent = ""; return; }
    const best = result.steps.map(s => s.lengths.indexOf(Math.max(...s.lengths)));
    const all = Float32Array.from(result.steps[sizes.n_iters - 1].c).sort(), few = Math.floor(0.005*all.length), at = k => all[k].toFixed(3);
    const same = best.every(j => j === best[0]) ? `For this drawing the answer is ${names[best[0]]} with any number of iterations; its length changes` : "For this drawing the answer depends on the number of iterations";
    $("honest").textContent = `${same}. With one iteration every coupling is exactly ${(1/classes).toFixed(3)} and nothing is routed. With ${sizes.n_iters}, as trained, 99 of 100 still lie between ${at(few)} and ${at(all.length - 1 - few)}: hardly any leaves 1/${classes}, and the sum of many small leanings makes the difference.`;
  }

  // -- controls --

  names.forEach((name, j) => {
    const bar = make("button", {type: "button"}, $("bars"));
    make("i", {}, bar);
    make("b", {textContent: name}, bar);
    make("small", {}, bar);
    bar.addEventListener("click", () => { state.kind = j; state.added.fill(0); if (state.result) showAll(); });
    make("th", {scope: "col", textContent: name}, root.querySelector("thead tr"));
    const row = make("div", {}, $("place"));
    make("span", {textContent: name}, row);
    make("i", {}, row);
    make("span", {}, row);
  });
  root.querySelectorAll("[data-primaries]").forEach(el => { el.textContent = (grid.rows*grid.cols*grid.types).toLocaleString("en"); });
  root.querySelectorAll("[data-types]").forEach(el => { el.textContent = grid.types; });
  root.querySelectorAll("[data-even]").forEach(el => { el.textContent = `1/${classes}`; });
  for (const name of LESSONS) root.querySelectorAll(`[data-lesson=${name}]`).forEach(a => { if (config.lessons !== null) a.href = `${config.lessons}${name}.html`; });

  // Start drawings: strokes of ours, or pictures of the run's own test set
  const turns = new Array(config.starts.length).fill(0);
  function begin(k, over = false) {
    const s = config.starts[k], turn = turns[k]++;
    const lean = [0, 0.16, -0.1][turn % 3], size = [1, 0.9, 1.08][turn % 3];      // each time a little different
    const bend = ([x, y]) => [0.5 + size*(x - 0.5) - lean*(y - 0.5), 0.5 + size*(y - 0.5)];
    const marks = s.strokes ? s.strokes.map(line => line.map(bend)) : [pictureMark(bytes64(s.pictures[turn % s.pictures.length]))];
    change(over ? [...state.marks, ...marks] : marks);
  }
  config.starts.forEach((s, k) => {
    const button = make("button", {type: "button", title: s.name}, $("starts"));
    button.setAttribute("aria-label", `start from ${s.name}`);
    if (s.strokes) {
      const lines = s.strokes.map(line => `<polyline points="${line.map(p => p.map(v => (100*v).toFixed(1)).join(",")).join(" ")}"/>`);
      button.innerHTML = `<svg viewBox="0 0 100 100" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="8" stroke-linecap="round" stroke-linejoin="round">${lines.join("")}</svg>`;
    } else show(make("canvas", {}, button), bytes64(s.pictures[0]), 255);
    button.addEventListener("click", () => begin(k));
  });
  const undo = () => { if (state.past.length) change(state.past.pop(), false); };
  const clear = () => { if (state.marks.length) change([]); };
  $("undo").addEventListener("click", undo);
  $("clear").addEventListener("click", clear);

  // -- a photograph: by file, by the phone's camera, pasted or dropped --

  async function photograph(file) {
    if (!file || !file.type.startsWith("image/")) return;
    const bitmap = await createImageBitmap(file), k = Math.min(1, 400/Math.max(bitmap.width, bitmap.height));
    const w = Math.max(1, Math.round(k*bitmap.width)), h = Math.max(1, Math.round(k*bitmap.height));
    const context = new OffscreenCanvas(w, h).getContext("2d");
    context.fillStyle = "#fff";                            // transparent is paper
    context.fillRect(0, 0, w, h);
    context.drawImage(bitmap, 0, 0, w, h);
    const {data} = context.getImageData(0, 0, w, h), grey = new Float64Array(w*h);
    for (let p = 0; p < w*h; p++) grey[p] = (0.299*data[4*p] + 0.587*data[4*p + 1] + 0.114*data[4*p + 2])/255;
    const ink = await ask({photo: grey, h, w});
    change([pictureMark(await ask({fit: ink, h, w}))]);
  }
  $("photo").addEventListener("change", e => { photograph(e.target.files[0]); e.target.value = ""; });
  host.addEventListener("paste", e => photograph(e.clipboardData.files[0]));
  document.addEventListener("paste", e => { if (e.target === document.body) photograph(e.clipboardData.files[0]); });
  $("pad").addEventListener("dragover", e => e.preventDefault());
  $("pad").addEventListener("drop", e => { e.preventDefault(); photograph(e.dataTransfer.files[0]); });

  // -- mouse, finger, pen, keyboard --

  const pad = $("pad");
  let stroke = null;
  const where = e => { const b = pad.getBoundingClientRect(); return [(e.clientX - b.left)/b.width, (e.clientY - b.top)/b.height]; };
  pad.addEventListener("pointerdown", e => {
    if (e.button) return;
    pad.setPointerCapture(e.pointerId);
    stroke = [where(e)];
    change([...state.marks, stroke]);
  });
  pad.addEventListener("pointermove", e => {
    if (!stroke || !pad.hasPointerCapture(e.pointerId)) return;
    const events = e.getCoalescedEvents ? e.getCoalescedEvents() : [];
    stroke.push(...(events.length ? events : [e]).map(where));
    refresh();
  });
  for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => { stroke = null; });
  pad.addEventListener("keydown", e => {
    const key = e.code.match(/^(?:Digit|Numpad)(\d)$/);
    if ((e.ctrlKey || e.metaKey) && e.key === "z") undo();
    else if (e.key === "Escape" || e.key === "Delete" || e.key === "Backspace") clear();
    else if (key && !e.ctrlKey && !e.altKey && !e.metaKey) {
      const k = config.starts.findIndex(s => s.name === key[1]);
      if (k < 0) return;
      begin(k, e.shiftKey);
    } else return;
    e.preventDefault();
  });
  new ResizeObserver(showPad).observe(pad);

  // -- the first sight: with the network in the page the first drawing, else a stored answer --

  if (config.first) {
    const {marks, picture, paints, primary, steps} = config.first, f2 = text => halves(bytes64(text));
    const step = s => Object.fromEntries(Object.entries(s).map(([k, v]) => [k, f2(v)]));
    const given = {paints: Object.fromEntries(Object.entries(paints).map(([j, v]) => [j, f2(v)])), primary: f2(primary), steps: steps.map(step)};
    Object.assign(state, {marks, picture: bytes64(picture), result: given});
    state.kind = order()[0];
  }
  showPad();
  showAll();
  if (config.first) return;
  if (typeof config.files.network !== "string") begin(Math.min(5, config.starts.length - 1));
}

// <capsule-draw src="…json">: the configuration comes from a file, or from a script tag beside it
if (typeof customElements !== "undefined" && !customElements.get("capsule-draw"))
  customElements.define("capsule-draw", class extends HTMLElement {
    async connectedCallback() {
      const template = this.querySelector("template");          // a browser older than 2024 left it where it was
      if (!this.shadowRoot && template) this.attachShadow({mode: "open"}).append(template.content);
      const inside = this.querySelector("script[type='application/json']");
      if (inside) return start(this.shadowRoot, unpack(JSON.parse(inside.textContent)));
      const url = new URL(this.getAttribute("src"), document.baseURI), answer = await fetch(url);
      const config = addresses(await answer.json(), url);
      if (config.first) config.first = await (await fetch(config.first)).json();
      start(this.shadowRoot, config);
    }
  });

// The files that a configuration names lie beside it
export function addresses(config, url) {
  const at = name => name && new URL(name, url).href;
  for (const part in config.files) config.files[part] = at(config.files[part]);
  return {...config, worker: at(config.worker), first: at(config.first)};
}

// The address of a module's text as a plain script: a page opened from disk may start no module as a worker
export function textWorker(text) {
  return URL.createObjectURL(new Blob([text.replace(/^export /gm, "")], {type: "text/javascript"}));
}

// The configuration of a page that holds everything: files in base64, the worker as text
function unpack(config) {
  for (const part in config.files) config.files[part] = bytes64(config.files[part]).buffer;
  config.worker = textWorker(config.worker);
  return config;
}
