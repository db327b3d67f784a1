// The light sliders: a picture and sixteen native sliders that are on the page before any script.
// At the first touch the decoder is fetched, and from then on each move draws the picture again.
import {addresses, bytes64, connect, halves, inkChange, show, signed} from "./draw.js";

customElements.define("capsule-sliders", class extends HTMLElement {
  connectedCallback() {
    const template = this.querySelector("template");            // a browser older than 2024 left it where it was
    if (!this.shadowRoot && template) this.attachShadow({mode: "open"}).append(template.content);
    const root = this.shadowRoot, all = [...root.querySelectorAll("input")];
    const [kind, which] = ["kind", "which"].map(id => root.getElementById(id));
    const [canvas, said] = ["picture", "said"].map(id => root.getElementById(id));
    let paint = null, config = null, coming = null, drawn = 0;

    const fetchDecoder = async () => {
      const url = new URL(this.getAttribute("src"), document.baseURI);
      said.textContent = "The decoder comes…";
      config = addresses(await (await fetch(url)).json(), url);
      const {header} = config, ask = connect(config.worker), mega = n => (n/1e6).toFixed(1);
      await ask({load: "decoder", header, from: config.files.decoder}, got => {
        said.textContent = `The decoder comes: ${mega(got)} of ${mega(header.bytes.decoder)} MB, once`;
      });
      const poses = halves(bytes64(config.poses)), dims = all.length, n = poses.length/dims/config.names.length;
      paint = added => {
        const j = Number(kind.value), from = (j*n + Number(which.value))*dims;
        return ask({paint: poses.slice(from, from + dims).map((v, d) => v + added[d]), j});
      };
      this.dataset.ready = "yes";
    };
    const wake = () => coming || (coming = fetchDecoder().catch(error => {
      said.textContent = `The decoder could not be fetched (${error.message}). Move a slider to try again.`;
      coming = null;
      throw error;
    }));

    const draw = async () => {
      const added = all.map(({value}) => Number(value)), turn = ++drawn;
      all.forEach((input, d) => {
        input.setAttribute("aria-valuetext", signed(added[d]));
        input.nextElementSibling.textContent = signed(added[d]);
      });
      try { await wake(); } catch { return; }
      const [before, after] = await Promise.all([paint(added.map(() => 0)), paint(added)]);
      if (turn !== drawn) return;                                // a later move is on its way
      show(canvas, after);
      all.forEach((input, d) => { input.parentElement.lastElementChild.textContent = config.hints[Number(kind.value)][d]; });
      said.textContent = added.every(v => v === 0) ? `class ${config.names[kind.value]}, image ${Number(which.value) + 1}` : inkChange(before, after);
    };
    root.querySelectorAll("input, select, button").forEach(el => { el.disabled = false; });
    all.forEach(input => input.addEventListener("input", draw));
    [kind, which].forEach(select => select.addEventListener("change", draw));
    root.getElementById("reset").addEventListener("click", () => { all.forEach(input => { input.value = 0; }); draw(); });
    for (const touch of ["pointerdown", "focusin"]) root.addEventListener(touch, () => wake().catch(() => {}), {once: true});
  }
});
