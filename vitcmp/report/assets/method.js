// Method, machines, limits: how the figures were made, where they are unfair, and the figures themselves to take away.
"use strict";

vitcmp.section("method", (root, payload) => {
  const { element } = vitcmp;
  const METHOD = [
    [
      "The same model",
      "Models are written twice, in JAX (flax.nnx) and in PyTorch, with one set of weights. In float64 they equal timm's to 1e-9, and each other layer by layer, at sizes that are not square and not divisible by the window. A JAX/torch ratio is refused where the logits of one photograph differ by more than rounding can explain.",
    ],
    [
      "Latency and throughput",
      "Two figures. Latency: one call, one synchronisation. Throughput: calls are queued, with one synchronisation at the end. Each is the median of timings with its 95 % order-statistic interval; with several runs (fresh processes) it is the median of their medians, with the interval of these from 6 runs on, and with fewer, which cannot give 95 %, the span of the runs' own intervals. No timing is dropped.",
    ],
    [
      "When a measurement stops",
      "After a warm-up until two halves agree, samples until the interval of the median is within 1 %: at least 30 samples and 1 s, at most 500 samples or a cap in seconds; then it is marked as not converged.",
    ],
    [
      "FLOPs",
      "2 per multiply-add, matmuls and convolutions only, executed padding included, from the specification of the model; equal to the FLOP to torch's counter on the meta device and to a walk over the jaxpr.",
    ],
    [
      "Memory",
      "Three figures that are never compared with one another: the parameters; the activation peak, which is what one call allocates beyond weights and inputs; the process peak, which is what the device reserved, or on a CPU the resident peak.",
    ],
    [
      "Numerics and kernels",
      "Enforced, never replaced by something else under their name: what a device cannot do is unsupported. float32 is true float32 in matmul and in convolution. The measured error against float64 is in every record.",
    ],
    ["Verdicts", "Faster, slower, same or ambiguous, from the interval of a ratio against a band of 3 %."],
    [
      "Failures",
      "Every attempt is a record. What ran out of memory, timed out, crashed or is unsupported is drawn at its image size; no batch is made smaller in silence.",
    ],
  ];
  const LIMITS = [
    "No accuracy is measured. The weights of a sweep are drawn from a seed: speed does not depend on them, but overflow in float16 could.",
    "With one run a side, what differs between processes is outside the interval: medians of single processes differ by 1 to 4 % on a shared host, and by more now and then. Several runs bring it in.",
    "Where the two sides of a comparison did not take turns, the machine's drift is inside their ratio.",
    "A best of all is the best of what was asked for: what was not swept may be faster.",
    "On a CPU, torch's float32 matmuls go to whichever library keeps float32's accuracy and is fast there; the record says which.",
    "JAX on a CPU runs depthwise, 1x1 and small-map convolutions as sums that XLA compiles well, 2 to 4 times faster than jax.lax.conv: its figures there are of this code, not of any Flax module. On GPU and TPU they are native convolutions.",
    "JAX has no sweep over compilers: XLA is what it is. Python's dispatch is outside JAX's latency as far as JAX allows.",
    "torch.compile replaces the math attention by a fused kernel where its patterns match; such a case is unsupported, because it is not what its name says.",
    "ViTDet's relative positions make a bias of n x n a head in the global blocks. Flash kernels on a GPU cannot take one, and are unsupported there.",
    "Latency of a train step includes AdamW. In torch, loss and gradients are compiled and AdamW is not; XLA compiles all of it. float16 training is unsupported.",
    "Models of other libraries run in their own framework only: no ratio, no parity, FLOPs as counted in their graph.",
    "Rows of the article are the minimum of 20 calls, where ours are medians, and their FLOPs leave out attention.",
  ];
  const COLUMNS = [
    "source",
    "origin",
    "device",
    "platform",
    "num_threads",
    "mode",
    "backend",
    "framework_version",
    "model",
    "family",
    "image_size",
    "height",
    "width",
    "batch_size",
    "numerics",
    "attention",
    "compile",
    "layout",
    "batch_norm",
    "weights",
    "status",
    "message",
    "latency_s",
    "latency_low_s",
    "latency_high_s",
    "call_s",
    "call_low_s",
    "call_high_s",
    "num_runs",
    "num_calls",
    "params",
    "image_flops",
    "step_flops",
    "parameters_bytes",
    "activation_peak_bytes",
    "process_peak_bytes",
    "peak_share",
    "others_cpu_share",
    "traffic_bytes",
    "is_converged",
    "is_contended",
  ];

  vitcmp.share(payload);
  const said = element("span", { class: "note", role: "status" });
  root.append(
    element(
      "dl",
      { class: "facts" },
      ...METHOD.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]),
    ),
    element("h3", {}, "Limits, and where this is unfair"),
    element("ul", {}, ...LIMITS.map((text) => element("li", {}, text))),
    element("h3", {}, "Machines"),
    ...environments(),
    element("h3", {}, "Ceilings"),
    ceilings(),
    element("h3", {}, "Are the outputs equal?"),
    parity(),
    element("h3", {}, "The figures"),
    element(
      "div",
      { class: "controls" },
      button("CSV of what is shown", "vitcmp-shown.csv", shown),
      button("CSV of all settings", "vitcmp-all.csv", () => vitcmp.rows(payload)),
      said,
    ),
    element(
      "p",
      { class: "note" },
      "Shown: the rows behind the points of the charts against image size, failures included. Times are in seconds, memory in bytes, FLOPs in FLOPs; an empty cell is unknown.",
    ),
    element(
      "p",
      { class: "note" },
      `Made by vitcmp ${payload.version ?? ""} from records alone. Colours: Okabe and Ito. Charts: Observable Plot and D3, both under the ISC licence.`,
    ),
  );

  function environments() {
    const list = payload.environments.map(environment);
    return list.length ? list : [element("p", { class: "empty" }, "No environment was recorded.")];
  }

  function environment({ device, facts }) {
    const rows = facts.map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value === null ? "–" : String(value))),
    );
    return element(
      "details",
      {},
      element("summary", {}, device),
      element(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": `Environment of ${device}` },
        element("table", { class: "facts" }, element("tbody", {}, ...rows)),
      ),
    );
  }

  function ceilings() {
    if (!payload.ceilings.length)
      return element("p", { class: "empty" }, "None was measured, and no maker's peak is known for these devices.");
    const rate = (name, scale) => (c) => vitcmp.number(vitcmp.scaled(c[name], scale));
    const columns = [
      { title: "Device", text: (c) => c.device },
      { title: "Framework", text: (c) => c.backend },
      { title: "Numerics", text: (c) => c.numerics },
      { title: "Measured, TFLOP/s", text: rate("flops_per_s", 1e-12), isNumber: true },
      { title: "Maker's, TFLOP/s", text: rate("peak_flops_per_s", 1e-12), isNumber: true },
      { title: "Measured, GB/s", text: rate("bytes_per_s", 1e-9), isNumber: true },
      { title: "Maker's, GB/s", text: rate("peak_bytes_per_s", 1e-9), isNumber: true },
      { title: "How", text: (c) => c.how },
    ];
    return vitcmp.table(columns, payload.ceilings, {
      caption: "The largest rates that were reached, and those that the maker states",
    });
  }

  /** Counts, for each device, step, model and numerics, how the outputs compare, with the largest error. */
  function parity() {
    const known = payload.comparisons.filter((c) => c.parity?.status);
    if (!known.length) return element("p", { class: "empty" }, "No point was measured in both frameworks.");
    const groups = d3
      .groups(known, (c) => [c.device, c.mode, c.model, c.numerics, c.weights].join("|"))
      .map(([, group]) => group);
    const count = (status) => (group) => String(group.filter((c) => c.parity.status === status).length);
    const power = (value) => (value === undefined ? "–" : value === 0 ? "0" : value.toExponential(1));
    const columns = [
      { title: "Device", text: ([c]) => c.device },
      { title: "Step", text: ([c]) => c.mode },
      { title: "Model", text: ([c]) => c.model },
      { title: "Numerics", text: ([c]) => c.numerics },
      { title: "Equal", text: count("equal"), isNumber: true },
      { title: "Differ", text: count("differs"), isNumber: true },
      { title: "Not proved", text: count("missing"), isNumber: true },
      { title: "Largest error", text: (group) => power(d3.max(group, (c) => c.parity.error)), isNumber: true },
      {
        title: "Its bound",
        text: (group) => power(d3.greatest(group, (c) => c.parity.error)?.parity.bound ?? undefined),
        isNumber: true,
      },
    ];
    return vitcmp.table(columns, groups, {
      caption:
        "Points by how the outputs of JAX and torch compare: largest difference of the logits over the largest logit",
      limit: 60,
    });
  }

  function shown() {
    return vitcmp
      .points(payload)
      .flatMap((point) => (point.row ? [point.row, ...point.failed.filter((row) => row !== point.row)] : point.failed));
  }

  function button(text, name, list) {
    const take = () => {
      const rows = list();
      vitcmp.download(
        name,
        vitcmp.csv(
          COLUMNS,
          rows.map((row) => COLUMNS.map((column) => row[column] ?? null)),
        ),
      );
      said.textContent = `${vitcmp.plural(rows.length, "row")} in ${name}`;
    };
    return element("button", { type: "button", onclick: take }, text);
  }
});
