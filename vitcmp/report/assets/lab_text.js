// What the lab says: what is shown, what PaliGemma's numbers advise, and exactly what the page computes.
"use strict";

vitcmp.labText = (() => {
  const { element } = vitcmp;
  const ARTICLE = "https://lucasb.eyer.be/articles/vit_cnn_speed.html";
  const PAPER = "https://arxiv.org/abs/2407.07726";
  // The article's rule, out of PaliGemma's results.
  const ENOUGH = [
    ["224 × 224 px", "natural photographs"],
    ["448 × 448 px", "text in photographs, phone screens, charts and diagrams"],
    ["896 × 896 px", "desktop screens and single-page documents"],
  ];
  const EXACTLY = [
    "Each resize is separable, with half-pixel centres. With antialias (all but nearest, area and “no antialias”) " +
      "the kernel widens with the scale where a side shrinks. Kernels and results are those of vitcmp/resample.py, " +
      "and so of tf.image.resize; a test compares them pixel by pixel.",
    "Sums are float64, rounded to float32 and clipped to 0..255 after each resize. Then they are cut off to whole " +
      "grey levels, as big_vision does (TensorFlow sums in float32, so its level is one lower now and then): after " +
      "two resizes a pixel is up to two levels too dark. The other choice rounds, halves up.",
    "sRGB values are averaged as they are and not as light, as all the usual input pipelines do. The browser " +
      "applies colour profiles and EXIF orientation when it decodes; transparency is laid over white.",
    "“Stretched to a square” ignores the proportions, as PaliGemma does; “kept” gives the longer side the size. " +
      "Either way both panes are drawn in the original's proportions. A size beyond the picture's own enlarges it.",
    "What a pane shows is resized once more, for your screen: smoothly by the browser where the screen has fewer " +
      "pixels than the picture, else with each pixel a rectangle. “Pixel for pixel” shows the original as it is; " +
      "“Save” keeps the model's own pixels.",
    "Tokens are whole patches: the edge that is left over at the right and below is cut off, as by a convolution " +
      "without padding.",
  ];

  function link(href, text) {
    return element("a", { href, rel: "noreferrer" }, text);
  }

  function introduction() {
    return element("div", {},
      element("p", {}, "If you cannot tell the answer from these pixels, neither can a model. A picture is resized " +
        "twice: down to the intrinsic resolution, which decides what detail is left, then to the size that the model " +
        "is given, which decides the tokens, and so the compute."),
      element("p", {}, "Your own picture never leaves this page: your browser reads it, and this page's content " +
        "security policy allows no network at all."));
  }

  function advice() {
    const items = ENOUGH.map(([size, what]) => element("li", {}, element("strong", {}, size), ` for ${what}`));
    return element("div", {},
      element("h3", {}, "What is enough?"),
      element("p", {}, "The rule of thumb of ", link(ARTICLE, "the article"),
        " that this report answers, out of PaliGemma's results:"),
      element("ul", {}, ...items),
      element("p", {}, "More pixels are two things: more detail, and more tokens to compute with. PaliGemma's middle " +
        "arm tells them apart: resized to 224 px and then to 448 px, a picture has the detail of the first and the " +
        "compute of the second. ", link(PAPER, "The paper"), " (section 5.7.1) finds the gain “split roughly " +
        "equally” between the two, wherever resolution matters; the article finds it “almost entirely” capacity for " +
        "ChartQA. With PaliGemma's patches of 14 px, 224 px are 256 tokens, 448 px 1,024, and 896 px 4,096."));
  }

  function exactly() {
    return element("details", {},
      element("summary", {}, "Exactly what this page computes"),
      element("ul", {}, ...EXACTLY.map((text) => element("li", {}, text))));
  }

  return { introduction, advice, exactly };
})();
