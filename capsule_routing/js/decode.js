// Sliders over stored poses: the explorer's widget and page. `capsnet.js`, which decodes, stands above it.

// 16-bit weights `(n, m)` and biases `(m,)` of each layer, one after the other, and `sizes` -> poses to pixels
export function readDecoder(weights, sizes) {
  const w = halves(weights), layers = [];
  let at = 0;
  for (let l = 0; l + 1 < sizes.length; l++) {
    const n = sizes[l], m = sizes[l+1];
    layers.push({W: w.subarray(at, at + n*m), b: w.subarray(at + n*m, at + n*m + m)});
    at += n*m + m;
  }
  return makeDecoder(layers);
}

// The state that Python sends -> a function of class, image and the numbers to add, all from zero, to pixels
export function makeExplorer({weights, poses, sizes, capsules, images, dims}) {
  const decode = readDecoder(weights, sizes), p = floats(poses);
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
