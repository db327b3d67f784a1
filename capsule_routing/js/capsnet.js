// A capsule network with dynamic routing in plain JavaScript: no imports, no WebAssembly, no GPU.
// One source for the page `Draw`, the sliders, the notebook's widgets and the pages that
// `capsule_explore` writes. Loaded as a worker, it answers messages (at the end).
// Axes as in the Python modules: i lower capsule, j upper, d lower pose, e upper pose.

// ---- Weights -------------------------------------------------------------------------------

// The 65,536 values of a 16-bit float, as `Float16Array` is too new to rely on.
const HALF = new Float32Array(65536);
for (let k = 0; k < 65536; k++) {
  const e = (k >> 10) & 31, f = k & 1023;
  const v = e === 0 ? f * 2**-24 : e === 31 ? (f ? NaN : Infinity) : (1 + f/1024) * 2**(e - 15);
  HALF[k] = k >> 15 ? -v : v;
}

// Little-endian 16-bit floats in a DataView -> Float32Array
export function halves(view) {
  const out = new Float32Array(view.byteLength / 2);
  for (let k = 0; k < out.length; k++) out[k] = HALF[view.getUint16(2*k, true)];
  return out;
}

// Little-endian 32-bit floats in a DataView -> Float32Array
export function floats(view) {
  const out = new Float32Array(view.byteLength / 4);
  for (let k = 0; k < out.length; k++) out[k] = view.getFloat32(4*k, true);
  return out;
}

// One tensor of the file: 16-bit floats, or 8-bit integers with a scale for each of the last axis
function tensor(buffer, {shape, at, scale}) {
  const n = shape.reduce((a, b) => a*b, 1), last = shape[shape.length - 1];
  if (scale === null) return halves(new DataView(buffer, at, 2*n));
  const q = new Int8Array(buffer, at, n), s = floats(new DataView(buffer, scale, 4*last));
  const out = new Float32Array(n);
  for (let k = 0, c = 0; k < n; k++) { out[k] = q[k] * s[c]; if (++c === last) c = 0; }
  return out;
}

// The header that Python wrote and the bytes of one part of the file -> {name: Float32Array}
export function readTensors(header, buffer, part) {
  const own = Object.entries(header.tensors).filter(([, t]) => t.part === part);
  return Object.fromEntries(own.map(([name, t]) => [name, tensor(buffer, t)]));
}

// ---- The picture that the network sees -------------------------------------------------------

// Exact area averaging along one axis: cell o of n covers [o*m/n, (o+1)*m/n) of m cells.
// `x` is (outer, m, inner); the result (outer, n, inner). 64-bit floats, as in Python.
function averaged(x, outer, m, inner, n) {
  const out = new Float64Array(outer*n*inner), width = m/n;
  for (let o = 0; o < n; o++) {
    const from = o*m/n, to = (o + 1)*m/n;
    for (let k = Math.floor(from); k < Math.min(m, Math.ceil(to)); k++) {
      const share = (Math.min(to, k + 1) - Math.max(from, k)) / width;
      if (share <= 0) continue;
      for (let a = 0; a < outer; a++)
        for (let b = 0; b < inner; b++) out[(a*n + o)*inner + b] += share * x[(a*m + k)*inner + b];
    }
  }
  return out;
}

// Ink `(h, w)`, 0 paper and 1 ink, -> 28x28 bytes as MNIST was made: the ink's box scaled into
// 20x20 with its aspect kept, and its centre of mass put into the middle
export function fitDigit(ink, h, w, side = 28, box = 20) {
  const picture = new Uint8Array(side*side);
  let [top, bottom, left, right] = [h, -1, w, -1];
  for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) if (ink[y*w + x] > 1/255) {
    if (y < top) top = y;
    bottom = y;
    if (x < left) left = x;
    if (x > right) right = x;
  }
  if (bottom < 0) return picture;                                        // no ink at all
  const bh = bottom - top + 1, bw = right - left + 1, k = box / Math.max(bh, bw);
  const sh = Math.max(1, Math.floor(k*bh + 0.5)), sw = Math.max(1, Math.floor(k*bw + 0.5));
  const cut = new Float64Array(bh*bw);
  for (let y = 0; y < bh; y++) for (let x = 0; x < bw; x++) cut[y*bw + x] = ink[(top + y)*w + left + x];
  const small = averaged(averaged(cut, 1, bh, bw, sh), sh, bw, 1, sw);    // (sh, sw)
  let most = 0, mass = 0, cy = 0, cx = 0;
  for (const v of small) most = Math.max(most, v);
  for (let y = 0; y < sh; y++) for (let x = 0; x < sw; x++) {
    const v = small[y*sw + x] /= most;
    mass += v;
    cy += v * (y + 0.5);
    cx += v * (x + 0.5);
  }
  const place = (c, n) => Math.min(side - n, Math.max(0, Math.floor(side/2 - c + 0.5)));
  const oy = place(cy/mass, sh), ox = place(cx/mass, sw);
  for (let y = 0; y < sh; y++) for (let x = 0; x < sw; x++)
    picture[(oy + y)*side + ox + x] = Math.floor(255*small[y*sw + x] + 0.5);
  return picture;
}

// ---- A photograph ----------------------------------------------------------------------------

// Otsu's threshold of values in [0, 1]: between it the two groups differ most
export function otsu(x) {
  const count = new Float64Array(256);
  for (const v of x) count[Math.min(255, Math.floor(256*v))]++;
  let all = 0, best = 0, at = 0, below = 0, sum = 0;
  count.forEach((n, k) => { all += n*k; });
  for (let k = 0; k < 255; k++) {
    below += count[k];
    sum += count[k]*k;
    const above = x.length - below;
    if (!below || !above) continue;
    const apart = below*above*(sum/below - (all - sum)/above)**2;
    if (apart > best) { best = apart; at = k + 1; }
  }
  return at/256;
}

// Means over squares of (2r+1) pixels, cut off at the border
function boxMean(x, h, w, r) {
  const sums = new Float64Array((h + 1)*(w + 1)), out = new Float64Array(h*w);
  for (let y = 0; y < h; y++) for (let z = 0; z < w; z++)
    sums[(y + 1)*(w + 1) + z + 1] = x[y*w + z] + sums[y*(w + 1) + z + 1] + sums[(y + 1)*(w + 1) + z] - sums[y*(w + 1) + z];
  for (let y = 0; y < h; y++) for (let z = 0; z < w; z++) {
    const [a, b, c, d] = [Math.max(0, y - r), Math.min(h, y + r + 1), Math.max(0, z - r), Math.min(w, z + r + 1)];
    out[y*w + z] = (sums[b*(w + 1) + d] - sums[a*(w + 1) + d] - sums[b*(w + 1) + c] + sums[a*(w + 1) + c]) / ((b - a)*(d - c));
  }
  return out;
}

// Grey `(h, w)` of a photograph, 0 black and 1 white, -> ink: what is darker than the paper around it
// by more than Otsu's threshold. A picture whose border is dark is taken as light ink on dark paper.
export function photoInk(grey, h, w) {
  let border = 0;
  for (let z = 0; z < w; z++) border += grey[z] + grey[(h - 1)*w + z];
  for (let y = 0; y < h; y++) border += grey[y*w] + grey[y*w + w - 1];
  const light = border/(2*(h + w)) > 0.5 ? grey : grey.map(v => 1 - v), paper = boxMean(light, h, w, Math.ceil(Math.max(h, w)/4));
  const dark = light.map((v, k) => Math.min(1, Math.max(0, paper[k] - v))), from = otsu(dark), most = dark.reduce((a, b) => Math.max(a, b), 0);
  return dark.map(v => v <= from || from === 0 ? 0 : Math.min(1, (v - from/2)/(most - from/2)));
}

// ---- The network, layer by layer -------------------------------------------------------------

// A convolution of features `(h, w, c)` with weights `(c, k, k, o)`, which skips features that are
// zero: nine tenths of them, since the paper of a drawing and what ReLU switched off are zero
export function convolve(x, [h, w, c], W, b, kernel, stride) {
  const n = b.length, oh = Math.floor((h - kernel)/stride) + 1, ow = Math.floor((w - kernel)/stride) + 1;
  const out = new Float32Array(oh*ow*n);
  for (let p = 0; p < oh*ow; p++) out.set(b, p*n);
  for (let y = 0; y < h; y++) for (let z = 0; z < w; z++) {
    const y0 = Math.max(0, Math.ceil((y - kernel + 1)/stride)), y1 = Math.min(oh - 1, Math.floor(y/stride));
    const z0 = Math.max(0, Math.ceil((z - kernel + 1)/stride)), z1 = Math.min(ow - 1, Math.floor(z/stride));
    for (let i = 0; i < c; i++) {
      const v = x[(y*w + z)*c + i];
      if (v === 0) continue;
      for (let a = y0; a <= y1; a++) for (let d = z0; d <= z1; d++) {
        let from = ((i*kernel + y - a*stride)*kernel + z - d*stride)*n, to = (a*ow + d)*n;
        for (let o = 0; o < n; o++) out[to++] += v * W[from++];
      }
    }
  }
  return {out, shape: [oh, ow, n]};
}

export function relu(x) {
  for (let k = 0; k < x.length; k++) if (x[k] < 0) x[k] = 0;
  return x;
}

// Equation 1: every vector of `d` numbers keeps its direction and becomes shorter than one
export function squash(s, d) {
  const out = new Float32Array(s.length);
  for (let k = 0; k < s.length; k += d) {
    let n2 = 0;
    for (let a = k; a < k + d; a++) n2 += s[a]*s[a];
    const f = Math.sqrt(n2 + 1e-16)/(1 + n2);
    for (let a = k; a < k + d; a++) out[a] = f*s[a];
  }
  return out;
}

export function lengths(v, d) {
  const out = new Float32Array(v.length/d);
  for (let k = 0; k < v.length; k++) out[Math.floor(k/d)] += v[k]*v[k];
  return out.map(Math.sqrt);
}

// Features `(h, w, types*d)` -> poses `(i, d)`; i runs over types, then rows, then columns
export function primaryCapsules(x, [h, w, n], d) {
  const u = new Float32Array(x.length), types = n/d;
  for (let p = 0; p < h*w; p++) for (let t = 0; t < types; t++)
    for (let a = 0; a < d; a++) u[(t*h*w + p)*d + a] = x[p*n + t*d + a];
  return squash(u, d);
}

// Equation 2: what each lower capsule predicts for each upper one, `(i, j, e)`, from W `(i, d, j, e)`
export function votes(u, W, {n_in, d_in, n_out, d_out}) {
  const je = n_out*d_out, out = new Float32Array(n_in*je);
  for (let i = 0; i < n_in; i++) for (let d = 0; d < d_in; d++) {
    const v = u[i*d_in + d];
    for (let k = 0, from = (i*d_in + d)*je, to = i*je; k < je; k++) out[to++] += v * W[from++];
  }
  return out;
}

function softmax(b, n) {
  const c = new Float32Array(b.length);
  for (let k = 0; k < b.length; k += n) {
    let most = -Infinity, sum = 0;
    for (let j = k; j < k + n; j++) most = Math.max(most, b[j]);
    for (let j = k; j < k + n; j++) sum += c[j] = Math.exp(b[j] - most);
    for (let j = k; j < k + n; j++) c[j] /= sum;
  }
  return c;
}

// Procedure 1: routing by agreement. Returns of each iteration the couplings `c` `(i, j)`,
// the sums `s` and the poses `v`, both `(j, e)`
export function route(uHat, {n_in, n_out, d_out}, iterations, priors = null) {
  const je = n_out*d_out, steps = [];
  const b = priors ? Float32Array.from(priors) : new Float32Array(n_in*n_out);
  for (let r = 0; r < iterations; r++) {
    const c = softmax(b, n_out), s = new Float32Array(je);
    for (let i = 0; i < n_in; i++) for (let j = 0; j < n_out; j++) {
      const share = c[i*n_out + j];
      for (let e = j*d_out; e < (j + 1)*d_out; e++) s[e] += share * uHat[i*je + e];
    }
    const v = squash(s, d_out);
    steps.push({c, s, v});
    if (r < iterations - 1) for (let i = 0; i < n_in; i++) for (let j = 0; j < n_out; j++) {
      let agreement = 0;
      for (let e = j*d_out; e < (j + 1)*d_out; e++) agreement += uHat[i*je + e] * v[e];
      b[i*n_out + j] += agreement;
    }
  }
  return steps;
}

// How much the lower capsules of each place add to the length of each upper one's sum, `(places, j)`:
// the parts of c*u_hat that point along v. Over all places they add up to the length of `s`.
export function contributions(uHat, {c, v}, {n_in, n_out, d_out}, places) {
  const out = new Float32Array(places*n_out), size = lengths(v, d_out);
  for (let i = 0; i < n_in; i++) for (let j = 0; j < n_out; j++) {
    let along = 0;
    for (let e = j*d_out; e < (j + 1)*d_out; e++) along += uHat[i*n_out*d_out + e] * v[e];
    out[(i % places)*n_out + j] += c[i*n_out + j] * along / Math.max(size[j], 1e-12);
  }
  return out;
}

// Layers `{W (n, m), b (m)}` -> a function from masked poses to pixels
export function makeDecoder(layers) {
  return function decode(x) {
    layers.forEach(({W, b}, l) => {
      const y = Float32Array.from(b), m = b.length, last = l === layers.length - 1;
      for (let i = 0; i < x.length; i++) {
        const v = x[i];
        if (v === 0) continue;          // a masked capsule, or a unit that ReLU switched off
        for (let o = 0, r = i*m; o < m; o++, r++) y[o] += v * W[r];
      }
      for (let o = 0; o < m; o++) y[o] = last ? 1/(1 + Math.exp(-y[o])) : Math.max(0, y[o]);
      x = y;
    });
    return x;
  };
}

// ---- The whole -------------------------------------------------------------------------------

// Pixels from the pose of one class, all others zero
export function makePainter(header, t) {
  const {classes, dims, decoder} = header.sizes;
  const decode = makeDecoder(Array.from({length: decoder}, (_, l) => ({W: t[`decoder.${l}.W`], b: t[`decoder.${l}.b`]})));
  return function paint(j, pose) {
    const x = new Float32Array(classes*dims);
    x.set(pose, j*dims);
    return decode(x);
  };
}

// A picture of bytes `(h, w)` -> all that the page shows. What the last layer says after its r-th
// iteration is what a network of r iterations says, so one look with five answers for fewer too.
export function makeNetwork(header, t) {
  const {height, width, kernel1, kernel2, stride, d_primary, layers} = header.sizes;
  return function look(picture, iterations = null) {
    const x = Float32Array.from(picture, v => v/255);
    const one = convolve(x, [height, width, 1], t["conv1.W"], t["conv1.b"], kernel1, 1);
    const two = convolve(relu(one.out), one.shape, t["conv2.W"], t["conv2.b"], kernel2, stride);
    const primary = primaryCapsules(two.out, two.shape, d_primary);
    let u = primary, uHat, steps;
    layers.forEach((layer, l) => {
      const n = l === layers.length - 1 && iterations || layer.n_iters;
      uHat = votes(u, t[`caps.${l}.W`], layer);
      steps = route(uHat, layer, n, t[`caps.${l}.priors`]);
      u = steps[n - 1].v;
    });
    const last = layers[layers.length - 1], places = layers.length === 1 ? two.shape[0]*two.shape[1] : 1;
    return {
      primary: lengths(primary, d_primary),
      steps: steps.map(s => ({...s, lengths: lengths(s.v, last.d_out), adds: contributions(uHat, s, last, places)})),
    };
  };
}

// ---- As a worker -----------------------------------------------------------------------------

// A file by its address: from the browser's cache, or the network with `tell(bytes so far)`.
// The address ends in a checksum, so that a file kept is a file that is right.
async function kept(url, tell) {
  const cache = typeof caches === "undefined" ? null : await caches.open("capsnet").catch(() => null);
  let answer = cache && await cache.match(url);
  if (!answer) {
    answer = await fetch(url);
    if (!answer.ok) throw new Error(`${answer.status} for ${url}`);
    const parts = [], reader = answer.body.getReader();
    for (let got = 0, chunk; !(chunk = await reader.read()).done; tell(got)) {
      parts.push(chunk.value);
      got += chunk.value.length;
    }
    const blob = new Blob(parts);
    if (cache) await cache.put(url, new Response(blob)).catch(() => {});
    return blob.arrayBuffer();
  }
  return answer.arrayBuffer();
}

// {load: part, header, from: address or bytes} | {fit: ink, h, w} | {photo: grey, h, w} | {look: picture, iterations}
// | {paint: pose, j}, each with an `id`, are answered by {id, done} or {id, failed}
function serve(scope) {
  const able = {fit: m => fitDigit(m.fit, m.h, m.w), photo: m => photoInk(m.photo, m.h, m.w)};
  able.load = async m => {
    const bytes = typeof m.from === "string" ? await kept(m.from, got => scope.postMessage({id: m.id, got})) : m.from;
    const t = readTensors(m.header, bytes, m.load);
    if (m.load === "decoder") able.paint = (paint => o => paint(o.j, o.paint))(makePainter(m.header, t));
    else able.look = (look => o => look(o.look, o.iterations))(makeNetwork(m.header, t));
  };
  scope.onmessage = async ({data}) => {
    try {
      const does = Object.keys(able).find(k => k in data);
      if (!does) throw new Error("not loaded yet");
      scope.postMessage({id: data.id, done: await able[does](data)});
    } catch (error) { scope.postMessage({id: data.id, failed: String(error.message || error)}); }
  };
}

if (typeof WorkerGlobalScope !== "undefined" && self instanceof WorkerGlobalScope) serve(self);
