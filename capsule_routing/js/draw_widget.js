// The page as a notebook's widget. `draw.js` stands above it.

export default {render({model, el}) {
  const host = el.appendChild(document.createElement("div")), root = host.attachShadow({mode: "open"});
  root.innerHTML = model.get("html");
  const bytes = name => { const {buffer, byteOffset, byteLength} = model.get(name); return buffer.slice(byteOffset, byteOffset + byteLength); };
  start(root, {...model.get("config"), files: {decoder: bytes("decoder"), network: bytes("network")}, worker: textWorker(model.get("worker"))});
}};
