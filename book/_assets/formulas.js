// A formula in the text that is wider than its column scrolls in a box of its own, as displayed formulas and tables do.
(() => {
  const fit = () => {
    for (const formula of document.querySelectorAll("span.math > mjx-container")) {
      formula.classList.remove("wide-formula");
      const column = formula.closest("table") ? null : formula.closest("p, li, dd, figcaption, article");
      if (column) formula.classList.toggle("wide-formula", formula.getBoundingClientRect().width > column.clientWidth);
    }
  };
  // What scrolls can be reached by keyboard.
  window.addEventListener("load", () => {
    for (const box of document.querySelectorAll(".pst-scrollable-table-container")) box.tabIndex = 0;
  });
  window.addEventListener("load", () => window.MathJax && MathJax.startup.promise.then(fit));
  window.addEventListener("resize", fit);
})();
