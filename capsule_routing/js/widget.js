// The view between the sliders: draws the picture, without a kernel too. `decode.js` stands above it.

const models = (model, name) =>
  Promise.all(model.get(name).map(id => model.widget_manager.get_model(id.replace("IPY_MODEL_", ""))));

// What a screen reader says: ipywidgets gives a slider's handle no name, and values of one decimal.
function speak(sliders, say) {
  const views = new Map();                                     // handle -> its observer
  const one = (handle, slider, d) => {
    const set = (key, value) => { if (handle.getAttribute(key) !== value) handle.setAttribute(key, value); };
    const now = () => {
      set("aria-label", say(d));
      set("aria-valuetext", signed(slider.get("value")));
      for (const [key, name] of [["min", "min"], ["max", "max"], ["now", "value"]]) set(`aria-value${key}`, slider.get(name).toFixed(2));
    };
    if (!views.has(handle)) {
      const watch = new MutationObserver(now);                 // the slider writes its own text at each move
      watch.observe(handle, {attributes: true, attributeFilter: ["aria-valuetext", "aria-valuenow"]});
      views.set(handle, watch);
    }
    now();
  };
  const all = () => sliders.forEach((slider, d) => Object.values(slider.views || {}).forEach(async promise => {
    const handle = (await promise).el.querySelector(".noUi-handle");
    if (handle) one(handle, slider, d);
  }));
  const grown = new MutationObserver(all);                     // sliders may be drawn after us
  grown.observe(document.body, {childList: true, subtree: true});
  all();
  return {all, stop() { grown.disconnect(); views.forEach(watch => watch.disconnect()); }};
}

async function render({model, el}) {
  const [sliders, labels, [kind, which]] = await Promise.all(["sliders", "labels", "choices"].map(name => models(model, name)));
  const state = Object.fromEntries(["weights", "poses", "sizes", "shape", "capsules", "images", "dims", "names", "numbers", "hints"]
    .map(name => [name, model.get(name)]));
  const picture = makeExplorer(state);

  el.classList.add("capsule-view");
  const canvas = el.appendChild(document.createElement("canvas"));
  canvas.setAttribute("role", "img");
  const said = el.appendChild(document.createElement("div"));
  said.className = "capsule-said";
  const line = said.appendChild(document.createElement("div"));
  line.className = "capsule-caption";
  line.setAttribute("aria-live", "polite");
  const reset = said.appendChild(document.createElement("button"));
  reset.type = "button";
  reset.className = "capsule-reset";
  reset.textContent = "Reset all to 0";

  const chosen = () => [kind.get("index"), which.get("index")];
  const show = () => draw(canvas, picture(...chosen(), sliders.map(s => s.get("value"))), state.shape);
  let soon = false;                                            // a reset moves them all: draw once
  const later = () => { if (!soon) { soon = true; queueMicrotask(() => { soon = false; show(); }); } };
  const voice = speak(sliders, d => `dimension ${d}, ${state.hints[kind.get("index")][d]}`);
  const choose = () => {
    const text = caption(state, ...chosen());
    line.textContent = text;
    canvas.setAttribute("aria-label", `The decoded picture: ${text}`);
    labels.forEach((label, d) => { label.set("value", state.hints[chosen()[0]][d]); label.save_changes(); });
    voice.all();
    later();
  };
  const zero = () => sliders.forEach(s => { s.set("value", 0); s.save_changes(); });
  sliders.forEach(s => s.on("change:value", later));
  [kind, which].forEach(c => c.on("change:index", choose));
  reset.addEventListener("click", zero);
  choose();
  return () => {
    sliders.forEach(s => s.off("change:value", later));
    [kind, which].forEach(c => c.off("change:index", choose));
    voice.stop();
  };
}

export default {render};
