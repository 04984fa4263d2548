// What needs a script: signing in through LiteLLM's page, and drawing charts. All pages work without it.
"use strict";

(function () {
  // LiteLLM's admin UI sends its claim when our page has loaded. The server checks it and takes it once; that the
  // message comes from a page which may show us is the browser's doing (frame-ancestors), and checked here by source.
  const door = document.querySelector("[data-claims]");
  if (door && window.parent !== window) {
    const note = document.getElementById("claim-note");
    let sent = false;
    window.addEventListener("message", async (event) => {
      const told = event.data;
      if (sent || event.source !== window.parent || !told || told.type !== "litellm-auth") return;
      if (typeof told.session_claim !== "string") return;
      sent = true;
      note.textContent = "LiteLLM is signing you in.";
      const answer = await fetch("/api/plugin-auth", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ session_claim: told.session_claim }),
      });
      if (answer.ok) {
        window.location.reload();
      } else {
        const body = await answer.json();
        note.textContent = "LiteLLM could not sign you in: " + body.error;
      }
    });
  }

  // A link into a part of the page that is folded away opens it.
  const target = window.location.hash && document.getElementById(decodeURIComponent(window.location.hash.slice(1)));
  if (target) target.scrollIntoView();

  document.body.addEventListener("htmx:responseError", (event) => {
    const place = event.detail.target;
    place.textContent = "That did not work (status " + event.detail.xhr.status + "). Load the page again.";
  });

  const drawn = new Map();

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function small(value) {
    return value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(1) : String(+value.toPrecision(4));
  }

  function rewardText(_, value) {
    return value === null || value === undefined ? "-" : value.toFixed(2);
  }

  function axes(format) {
    const shared = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    return [{ ...shared, ...(format || {}) }, { ...shared, size: 60, values: (_, ticks) => ticks.map(small) }];
  }

  function marksPlugin(marks) {
    return {
      hooks: {
        draw: (plot) => {
          const pen = plot.ctx;
          pen.save();
          pen.strokeStyle = colour("--quiet");
          pen.fillStyle = colour("--quiet");
          pen.setLineDash([4, 4]);
          pen.font = 11 * devicePixelRatio + "px sans-serif";
          pen.textAlign = "left";
          let free = -Infinity;
          for (const mark of marks) {
            const x = plot.valToPos(mark.at, "x", true);
            if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
            pen.beginPath();
            pen.moveTo(x, plot.bbox.top);
            pen.lineTo(x, plot.bbox.top + plot.bbox.height);
            pen.stroke();
            if (x > free) {
              pen.fillText("v" + mark.version, x + 3, plot.bbox.top + 12 * devicePixelRatio);
              free = x + 26 * devicePixelRatio;
            }
          }
          pen.restore();
        },
      },
    };
  }

  // uPlot's own are those of one country. Each row: seconds from which it is used, the label, and what is added when the
  // year, day or minute has changed (uPlot's documentation, "axis & grid opts").
  const CLOCK = [
    [31536000, "{YYYY}", null, null, null, null, null, null, 1],
    [2419200, "{MMM}", "\n{YYYY}", null, null, null, null, null, 1],
    [86400, "{D} {MMM}", "\n{YYYY}", null, null, null, null, null, 1],
    [60, "{HH}:{mm}", "\n{D} {MMM} {YYYY}", null, "\n{D} {MMM}", null, null, null, 1],
    [1, "{HH}:{mm}:{ss}", "\n{D} {MMM} {YYYY}", null, "\n{D} {MMM}", null, null, null, 1],
  ];

  // The newest version may have come after the newest reply: a little room for its mark.
  function withMarks(marks) {
    return (plot, low, high) => {
      const later = marks.map((mark) => mark.at).filter((at) => at > high && at < high + (high - low) * 0.1);
      return [low, Math.max(high, ...later.map((at) => at + (high - low) * 0.03))];
    };
  }

  function learning(place, curve) {
    const note = document.querySelector('[data-note="learning"]');
    if (!curve.at.length) {
      place.textContent = "No reply has a reward yet.";
      return;
    }
    if (curve.sampled) note.append(" The history is long: " + curve.replies + " replies of it were read.");
    const clear = "rgba(0,0,0,0)";
    const options = {
      width: place.clientWidth,
      height: 280,
      scales: { x: { range: withMarks(curve.marks) }, y: { range: [-1.05, 1.05] } },
      axes: axes({ values: CLOCK, space: 90 }),
      series: [
        { label: "time (UTC)", value: "{YYYY}-{MM}-{DD} {HH}:{mm}:{ss}" },
        { label: "mean reward", value: rewardText, stroke: colour("--accent"), width: 2, points: { show: true, size: 5 } },
        { label: "high", value: rewardText, stroke: clear, points: { show: false } },
        { label: "low", value: rewardText, stroke: clear, points: { show: false } },
      ],
      bands: [{ series: [2, 3], fill: colour("--band") }],
      tzDate: (at) => uPlot.tzDate(new Date(at * 1000), "Etc/UTC"),
      plugins: [marksPlugin(curve.marks)],
      hooks: { ready: [(plot) => plot.setLegend({ idx: curve.at.length - 1 })] },
    };
    drawn.set(place, [new uPlot(options, [curve.at, curve.mean, curve.high, curve.low], place)]);
    table("learning", ["time (UTC)", "mean reward", "low", "high", "replies"], curve.at.map((at, i) => [
      new Date(at * 1000).toISOString().slice(0, 19).replace("T", " "), curve.mean[i], curve.low[i], curve.high[i], curve.n[i],
    ]));
  }

  const FIGURES = { loss: "loss", kl_base: "KL to the base model", gap: "gap to the sampler", entropy: "entropy", tokens_per_second: "tokens a second", reward: "reward of the batch" };

  function training(place, curve) {
    const plots = [];
    for (const [name, words] of Object.entries(FIGURES)) {
      if (curve[name].every((value) => value === null)) continue;
      const box = document.createElement("div");
      place.append(box);
      const options = {
        title: words,
        width: box.clientWidth,
        height: 180,
        scales: { x: { time: false } },
        legend: { show: false },
        axes: axes({ values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? "v" + tick : "")) }),
        series: [{ label: "version" }, { label: words, stroke: colour("--accent"), width: 2, points: { show: true, size: 5 } }],
      };
      plots.push(new uPlot(options, [curve.version, curve[name]], box));
    }
    drawn.set(place, plots);
    const names = Object.keys(FIGURES);
    table("training", ["version", ...names.map((name) => FIGURES[name])], curve.version.map((number, i) => ["v" + number, ...names.map((name) => curve[name][i])]));
  }

  function table(name, heads, rows) {
    const place = document.querySelector('[data-table="' + name + '"]');
    if (!place) return;
    const made = document.createElement("table");
    const head = made.createTHead().insertRow();
    for (const words of heads) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = words;
      head.append(cell);
    }
    const body = made.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const value of row) {
        line.insertCell().textContent = typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : (value ?? "-");
      }
    }
    place.replaceChildren(made);
  }

  async function charts() {
    const places = [...document.querySelectorAll("[data-curves]")];
    if (!places.length) return;
    const answer = await fetch(places[0].dataset.curves);
    if (!answer.ok) {
      for (const place of places) place.textContent = "The curves could not be read (status " + answer.status + ").";
      return;
    }
    const curves = await answer.json();
    for (const place of places) {
      if (place.dataset.chart === "learning") learning(place, curves.learning);
      else training(place, curves.training);
    }
    document.documentElement.dataset.drawn = "yes";
  }

  window.addEventListener("resize", () => {
    for (const [place, plots] of drawn) {
      for (const plot of plots) plot.setSize({ width: (place.classList.contains("chart") ? place : plot.root.parentNode).clientWidth, height: plot.height });
    }
  });
  charts();
})();
