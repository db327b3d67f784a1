// The decoder of a capsule network in JavaScript: no imports, no network.
// One source for the notebook's widget and for the page that capsule_explore writes.

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

// Weights `(n, m)` and biases `(m,)` of each layer, one after the other, and `sizes` -> masked poses to pixels
export function makeDecoder(weights, sizes) {
  const w = halves(weights), layers = [];
  let at = 0;
  for (let l = 0; l + 1 < sizes.length; l++) {
    const n = sizes[l], m = sizes[l+1];
    layers.push({W: w.subarray(at, at + n*m), b: w.subarray(at + n*m, at + n*m + m), n, m});
    at += n*m + m;
  }
  return function decode(x) {
    layers.forEach(({W, b, n, m}, l) => {
      const y = Float32Array.from(b), last = l === layers.length - 1;
      for (let i = 0; i < n; i++) {
        const v = x[i];
        if (v === 0) continue;          // a masked capsule, or a unit that ReLU switched off
        for (let o = 0, r = i*m; o < m; o++, r++) y[o] += v * W[r];
      }
      for (let o = 0; o < m; o++) y[o] = last ? 1 / (1 + Math.exp(-y[o])) : Math.max(0, y[o]);
      x = y;
    });
    return x;
  };
}

// The state that Python sends -> a function of class, image and the numbers to add, all from zero, to pixels
export function makeExplorer({weights, poses, sizes, capsules, images, dims}) {
  const decode = makeDecoder(weights, sizes), p = floats(poses);
  return function picture(k, image, added) {
    const x = new Float32Array(sizes[0]);                      // all capsules zero,
    const from = (k*images + image) * dims, to = capsules[k] * dims;
    for (let d = 0; d < dims; d++) x[to + d] = p[from + d] + added[d];   // but one
    return decode(x);
  };
}

// Pixels `(c, h, w)` in [0, 1] onto a canvas of w by h
export function draw(canvas, pixels, [c, h, w]) {
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const context = canvas.getContext("2d"), image = context.createImageData(w, h);
  for (let k = 0; k < h*w; k++) {
    for (let s = 0; s < 3; s++) image.data[4*k + s] = Math.round(255 * pixels[(c === 3 ? s : 0)*h*w + k]);
    image.data[4*k + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

// 0.05 -> "+0.05", with a real minus sign
export function signed(v) {
  const text = Math.abs(v).toFixed(2);
  return (text === "0.00" ? "" : v < 0 ? "−" : "+") + text;
}

// The line under the picture, and the picture's text for those who do not see it
export function caption({names, numbers}, k, image) {
  const number = numbers[k][image];
  return `class ${names[k]}, image ${image + 1}` + (number < 0 ? "" : ` (number ${number} of the test set)`);
}
