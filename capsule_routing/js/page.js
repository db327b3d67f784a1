// The page that capsule_explore writes. `decode.js` stands above it, the state in a script tag of its own.

const state = JSON.parse(document.getElementById("state").textContent);
for (const name of ["weights", "poses"]) {
  const bytes = Uint8Array.from(atob(state[name]), c => c.charCodeAt(0));
  state[name] = new DataView(bytes.buffer);
}
const picture = makeExplorer(state);
const [canvas, kind, which] = ["canvas", "#class", "#image"].map(s => document.querySelector(s));
const make = (tag, given, parent) => parent.appendChild(Object.assign(document.createElement(tag), given));

state.names.forEach((name, k) => make("option", {value: k, textContent: name}, kind));
for (let k = 0; k < state.images; k++) make("option", {value: k, textContent: k + 1}, which);
const rows = Array.from({length: state.dims}, (_, d) => {
  const row = make("div", {className: "row"}, document.getElementById("rows"));
  make("label", {htmlFor: `dim-${d}`, textContent: d}, row).setAttribute("aria-label", `dimension ${d}`);
  const input = make("input", {id: `dim-${d}`, type: "range", min: -state.reach, max: state.reach, step: state.step, value: 0}, row);
  const output = make("output", {}, row), hint = make("span", {id: `hint-${d}`, className: "hint"}, row);
  output.setAttribute("for", input.id);
  output.setAttribute("aria-live", "off");
  input.setAttribute("aria-label", `dimension ${d}`);
  input.setAttribute("aria-describedby", hint.id);
  input.addEventListener("input", show);
  return {input, output, hint};
});

function show() {
  const added = rows.map(({input}) => Number(input.value));
  rows.forEach(({input, output}, d) => {
    output.textContent = signed(added[d]);
    input.setAttribute("aria-valuetext", signed(added[d]));
  });
  draw(canvas, picture(Number(kind.value), Number(which.value), added), state.shape);
}

function choose() {
  const text = caption(state, Number(kind.value), Number(which.value));
  document.getElementById("caption").textContent = text;
  canvas.setAttribute("aria-label", `The decoded picture: ${text}`);
  rows.forEach(({hint}, d) => { hint.textContent = state.hints[Number(kind.value)][d]; });
  show();
}

kind.value = which.value = 0;
for (const c of [kind, which]) c.addEventListener("change", choose);
document.getElementById("reset").addEventListener("click", () => { rows.forEach(({input}) => { input.value = 0; }); show(); });
choose();
