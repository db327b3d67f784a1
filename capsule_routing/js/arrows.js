// Routing as arrows: two children, three parents, poses of two numbers. `host` holds the static picture that this replaces.
const NS = 'http://www.w3.org/2000/svg', NAMES = ['A', 'B', 'C'], INK = ['#1f6fc0', '#c2540a'];
const LESSON = [[[1, .5], [0, 1], [.1, 0]], [[1, .4], [0, -1], [0, .1]]];
const MATE = [[[.1, 0], [0, .1], [-.6, .9]], [[0, .1], [.1, 0], [-.5, 1]]];   // another image: its children agree about C
const R = 62, X = j => 75 + 150*j, Y = 76, clone = v => JSON.parse(JSON.stringify(v));

export const softmax = b => { const e = b.map(Math.exp), n = e.reduce((x, y) => x+y); return e.map(o => o/n) };
export const squash = s => { const n2 = s[0]**2 + s[1]**2, k = Math.sqrt(n2 + 1e-16)/(1 + n2); return s.map(o => o*k) };
export function pass(votes, b) {   // one pass of Procedure 1: couplings, poses, agreements
  const c = b.map(softmax);
  const v = NAMES.map((_, j) => squash([0, 1].map(e => votes.reduce((n, u, i) => n + c[i][j]*u[j][e], 0))));
  return {c, v, agree: votes.map(u => u.map((o, j) => o[0]*v[j][0] + o[1]*v[j][1]))};
}
export function route(votes, n, averaged) {   // the state at iteration n; `averaged`: logits shared with the batch-mate
  const plus = (b, a) => b.map((row, i) => row.map((o, j) => o + a[i][j]));
  let b = [[0, 0, 0], [0, 0, 0]], own = b, mate = b;
  for (let r = 1; ; r++) {
    const a = pass(votes, own), m = pass(MATE, mate);
    if (r === n) return a;
    own = plus(own, a.agree); mate = plus(mate, m.agree);
    if (averaged) own = mate = own.map((row, i) => row.map((o, j) => (o + mate[i][j])/2));
  }
}

const el = (tag, at = {}, ...inner) => {
  const o = document.createElementNS(NS, tag);
  for (const k in at) o.setAttribute(k, at[k]);
  o.append(...inner); return o;
};
const arrow = (x, y, [dx, dy], at) => {
  const n = Math.hypot(dx, dy), tip = [x + dx*R, y - dy*R], a = Math.atan2(-dy, dx), h = 7;
  const head = [-.45, .45].map(t => `L${tip[0] - h*Math.cos(a+t)} ${tip[1] - h*Math.sin(a+t)} M${tip}`).join(' ');
  return el('path', {d: `M${x} ${y} L${tip} ${n > .05 ? 'M' + tip + ' ' + head : ''}`, fill: 'none', 'stroke-linecap': 'round', ...at});
};

export default function arrows(host) {
  let votes = clone(LESSON), n = 1, averaged = false;
  const svg = el('svg', {viewBox: '0 0 450 196', role: 'group', 'aria-label': 'Votes of two children for three parents'});
  const say = document.createElement('p'), row = document.createElement('p');
  say.setAttribute('aria-live', 'polite'); row.className = 'arrows-buttons';
  const tips = [0, 1].map(i => NAMES.map((name, j) => {
    const t = el('circle', {r: 9, fill: INK[i], 'fill-opacity': .25, stroke: INK[i], tabindex: 0, role: 'slider', 'aria-valuemin': 0, 'aria-valuemax': 2});
    const move = (x, y) => { votes[i][j] = [x, y].map(o => Math.max(-1.1, Math.min(1.1, Math.round(o*20)/20))); draw(); };
    t.onpointerdown = e => { t.setPointerCapture(e.pointerId); t.focus(); e.preventDefault(); };
    t.onpointermove = e => {
      if (!t.hasPointerCapture(e.pointerId)) return;
      const p = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
      move((p.x - X(j))/R, (Y - p.y)/R);
    };
    t.onkeydown = e => {
      const d = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[e.key];
      if (d) { e.preventDefault(); move(votes[i][j][0] + d[0]/10, votes[i][j][1] + d[1]/10); }
    };
    return t;
  }));
  const back = el('g'), front = el('g');
  svg.append(back, ...tips.flat(), front);
  const button = (text, act) => { const b = document.createElement('button'); b.type = 'button'; b.textContent = text; b.onclick = () => { act(b); draw(); }; row.append(b); return b; };
  button('Step an iteration', () => n = Math.min(n+1, 9));
  button('Start again', () => { n = 1; votes = clone(LESSON); });
  button('Make them disagree', () => votes[1][0] = votes[0][0].map(o => -o));
  button('Average over the batch (the mistake)', b => { averaged = !averaged; b.setAttribute('aria-pressed', averaged); }).setAttribute('aria-pressed', false);

  function draw() {
    const {c, v} = route(votes, n, averaged), length = v.map(o => Math.hypot(...o));
    back.replaceChildren(); front.replaceChildren();
    NAMES.forEach((name, j) => {
      back.append(el('circle', {cx: X(j), cy: Y, r: R, fill: 'none', stroke: 'currentColor', 'stroke-opacity': .35}),
        el('text', {x: X(j)-70, y: 14, fill: 'currentColor', 'font-size': 13, 'font-weight': 600}, name));
      votes.forEach((u, i) => back.append(arrow(X(j), Y, u[j], {stroke: INK[i], 'stroke-width': 1 + 8*c[i][j], 'data-child': i})));
      back.append(arrow(X(j), Y, v[j], {stroke: 'currentColor', 'stroke-width': 2.5, 'stroke-dasharray': '5 4'}));
      votes.forEach((u, i) => {
        tips[i][j].setAttribute('cx', X(j) + u[j][0]*R); tips[i][j].setAttribute('cy', Y - u[j][1]*R);
        tips[i][j].setAttribute('aria-label', `vote of child ${i+1} for parent ${name}`);
        tips[i][j].setAttribute('aria-valuenow', Math.hypot(...u[j]).toFixed(2));
        tips[i][j].setAttribute('aria-valuetext', `${u[j][0].toFixed(2)} right, ${u[j][1].toFixed(2)} up, coupling ${c[i][j].toFixed(2)}`);
        front.append(el('text', {x: X(j) - 62 + 66*i, y: 158, fill: 'currentColor', 'font-size': 11}, `c${i+1} ${c[i][j].toFixed(2)}`),
          el('rect', {x: X(j) - 62 + 66*i, y: 162, width: 56*c[i][j], height: 4, fill: INK[i]}));
      });
      front.append(el('text', {x: X(j)-62, y: 182, fill: 'currentColor', 'font-size': 11}, `length ${length[j].toFixed(2)}`),
        el('rect', {x: X(j)-62, y: 186, width: 122, height: 8, fill: 'currentColor', 'fill-opacity': .15}),
        el('rect', {x: X(j)-62, y: 186, width: 122*length[j], height: 8, fill: 'currentColor', 'data-length': length[j].toFixed(6)}));
    });
    const best = length.indexOf(Math.max(...length));
    say.textContent = `Iteration ${n}: ${NAMES[best]} is the longest, ${length[best].toFixed(2)}; child 1 gives it ${c[0][best].toFixed(2)} of itself, child 2 ${c[1][best].toFixed(2)}.`
      + (averaged ? ' The logits are averaged with those of another image, whose children agree about C: your digit now depends on it.' : '');
  }
  draw();
  host.replaceChildren(svg, say, row);
}
for (const o of document.querySelectorAll('.capsule-arrows')) if (!o.dataset.live) { o.dataset.live = 1; arrows(o); }
