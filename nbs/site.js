// What the pages do beyond Quarto. Without it all code is open and everything can be read.
(() => {
  const pages = document.querySelector('#quarto-document-content');
  if (!pages) return;

  // Two lanes: the lesson alone, or with the exported source and the tests below it.
  for (const cell of pages.querySelectorAll('div.cell[id^="test"]')) {
    const code = cell.querySelector(':scope > .sourceCode');
    if (!code) continue;
    const box = document.createElement('details'), name = document.createElement('summary');
    box.className = 'code-fold'; box.open = true; name.textContent = 'Test';
    code.before(box); box.append(name, code);
  }
  const boxes = [...pages.querySelectorAll('details.code-fold')];
  const remember = {
    get: () => { try { return localStorage.getItem('capsule-code') } catch { return null } },
    set: v => { try { localStorage.setItem('capsule-code', v) } catch { /* private window */ } },
  };
  if (boxes.length) {
    const row = document.createElement('div');
    row.className = 'code-switch'; row.setAttribute('role', 'group'); row.setAttribute('aria-label', 'Exported source and tests');
    row.append('code:');
    const buttons = ['all', 'folded'].map(kind => {
      const b = document.createElement('button');
      b.type = 'button'; b.textContent = kind; b.onclick = () => { fold(kind); remember.set(kind); };
      row.append(b);
      return b;
    });
    const fold = kind => {
      for (const o of boxes) o.open = kind === 'all';
      for (const b of buttons) b.setAttribute('aria-pressed', String(b.textContent === kind));
    };
    pages.querySelector('#title-block-header')?.append(row);
    fold(remember.get() === 'all' ? 'all' : 'folded');
    const show = () => { // a link may lead into a folded box
      const at = location.hash.length < 2 ? null : document.getElementById(decodeURIComponent(location.hash.slice(1)));
      for (let o = at?.closest('details'); o; o = o.parentElement.closest('details')) o.open = true;
      if (at?.closest('details')) at.scrollIntoView();
    };
    show(); addEventListener('hashchange', show);
  }

  // What scrolls sideways can be reached with the keyboard.
  const reach = () => {
    for (const o of pages.querySelectorAll('pre, table.table, .cell-output, .katex-display')) {
      const wide = o.scrollWidth > o.clientWidth + 1;
      if (wide && !o.hasAttribute('tabindex')) o.tabIndex = 0;
      else if (!wide && o.getAttribute('tabindex') === '0') o.removeAttribute('tabindex');
    }
  };
  // Quarto's search box has no name.
  addEventListener('load', () => document.querySelectorAll('.aa-Autocomplete, .aa-DetachedSearchButton').forEach(o => o.setAttribute('aria-label', 'Search')));
  addEventListener('load', reach); addEventListener('resize', reach);
  pages.addEventListener('toggle', reach, true);
})();
