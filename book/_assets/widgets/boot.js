// Runs before RequireJS and the widget manager, so that both find their files beside this one and nowhere else.
// tools/assets.py fetches those files: RequireJS (MIT), the Jupyter widget manager (BSD-3-Clause), its icon fonts (OFL-1.1).
(() => {
  const here = new URL("./", document.currentScript.src).href;
  window.require = { baseUrl: here };
  window.__jupyter_widgets_assets_path__ = here + "@jupyter-widgets/html-manager/dist/";
  // The widget manager asks for formulas the way of MathJax 2; the pages have MathJax 3.
  document.addEventListener("DOMContentLoaded", () => {
    const maths = window.MathJax;
    if (maths && maths.typesetPromise && !maths.Hub) {
      maths.Hub = { Queue: (job) => maths.typesetPromise([job[2]]) };
    }
  });
  // A slider's label stands beside its handle but is not tied to it; a screen reader needs the name on the handle.
  new MutationObserver(() => {
    for (const handle of document.querySelectorAll(".widget-slider [role=slider]:not([aria-label])")) {
      const label = handle.closest(".widget-slider").querySelector(".widget-label");
      if (label && label.textContent) handle.setAttribute("aria-label", label.textContent);
    }
  }).observe(document, { childList: true, subtree: true });
})();
