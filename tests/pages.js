// What test_pages.py asks the browser about the open page. Each answer is a list of faults, or a promise of one.
const page = document.documentElement;
const all = (selector) => [...document.querySelectorAll(selector)];
const style = getComputedStyle;

const checks = {
  // Formulas and widgets are there a moment after the page.
  async ready(widgetView) {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    const views = all(`script[type="${widgetView}"]`);
    const drawn = () => views.every((view) => view.parentElement.querySelector(".jupyter-widgets"));
    for (let begun = Date.now(); !drawn() && Date.now() - begun < 60000; ) await new Promise((go) => setTimeout(go, 20));
    return drawn() ? [] : ["a widget is not drawn"];
  },

  maths() {
    const [formulas, drawn] = [all(".math").length, all("mjx-container").length];
    const wrong = all("mjx-merror, mjx-container [mathcolor='red'], mjx-container [style*='color: red']");
    return [
      ...(formulas === drawn ? [] : [`${formulas} formulas, ${drawn} drawn`]),
      ...wrong.map((e) => `a formula has an error or an unknown command: ${e.textContent || e.outerHTML}`),
    ];
  },

  dimmed() {
    const plain = (s) => s.filter === "none" && s.opacity === "1" && s.mixBlendMode === "normal";
    const within = (e) => e && (!plain(style(e)) || within(e.parentElement));
    return all("article img").filter(within).map((e) => `in dark mode the grey values change in the picture: ${e.alt}`);
  },

  // Wider than the screen: the page itself, or something that sticks out where nothing scrolls.
  async wide() {
    for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame); // the layout for a new width
    const width = page.clientWidth, full = Math.max(page.scrollWidth, document.body.scrollWidth);
    const boxed = (e) => ["auto", "scroll"].includes(style(e).overflowX);
    const scrolls = (e) => e && e !== document.body && (boxed(e) || scrolls(e.parentElement));
    const out = all("article *").filter((e) => e.getClientRects().length && e.getBoundingClientRect().right > width + 1
      && style(e).position !== "absolute" && !e.closest("mjx-assistive-mml") && !scrolls(e));
    const text = (e) => (e.localName === "mjx-container" ? e.textContent : e.outerHTML).slice(0, 160);
    return [
      ...(full > width ? [`on a phone the page is ${full} wide, the screen ${width}`] : []),
      ...out.filter((e) => !out.includes(e.parentElement)).map((e) => `on a phone this sticks out: ${text(e)}`),
    ];
  },

  // Serious and critical faults. Left out: MathJax's own drawing, which a reader is told in MathML; the theme's search button,
  // which is called Search and shows its shortcut besides; the list of references, to which docutils gives roles of an older
  // standard; the parts of signatures, all in one colour. They are taken away, last on each page: a scan of thousands of
  // elements is slow.
  async scan(options) {
    all("mjx-container, .search-button-field, .citation-list, .sig-param").forEach((e) => e.remove());
    const found = await axe.run({ resultTypes: ["violations"], preload: false, ...options });
    const why = (node) => [...node.any, ...node.all].map((check) => check.message).join(" ").slice(0, 200);
    const where = (fault) => fault.nodes.slice(0, 4).map((n) => `${n.html.slice(0, 160)} (${why(n)})`).join(" | ");
    return found.violations.filter((fault) => ["serious", "critical"].includes(fault.impact))
      .map((fault) => `${fault.id}: ${fault.help}: ${where(fault)}`);
  },

  shown: () => all("article .widget-html-content img").filter((e) => e.offsetParent).map((e) => [e.alt, e.src]),
};
