//! Charts as SVG, by hand: bars of every library per case, curves of growth, of accuracy and of GPUs.

use crate::accuracy::{Curve, HEAD_DIM, WINDOW};
use crate::cases::THETA;
use crate::gpu;
use crate::gpu::results::{COPY_KERNEL, Kind, Launch, Results, Row, thousands};
use crate::limits::{MEMCPY, UPDATE};
use crate::phasor::PHASOR;
use crate::report::{Measurement, Report, axes, threads_name};
use std::fmt::Write;

/// Colours that can be told apart on light and dark ground; phasor's is the first.
const COLOURS: [&str; 8] = [
    "#d9480f", "#4c8dd6", "#2f9e6e", "#b8860b", "#9067c6", "#c2559d", "#2aa1b3", "#8a8f98",
];

const STYLE: &str = "<style>\
text{font:11px system-ui,sans-serif;fill:#1f2328}\
.ground{fill:#fff}.title{font-size:15px;font-weight:600}.panel{font-weight:600}\
.small{font-size:10px;fill:#59636e}\
.value{font-size:9px}\
.grid{stroke:#d1d9e0;stroke-width:1}.limit{stroke:#1f2328;stroke-width:1.5}\
.guide{stroke:#59636e;stroke-width:1;stroke-dasharray:4 3}\
.curve{fill:none;stroke-width:2;stroke-linejoin:round}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ground{fill:#0d1117}\
.small{fill:#9198a1}.grid{stroke:#3d444d}.limit{stroke:#e6edf3}\
.guide{stroke:#9198a1}}</style>";

const MARGIN: f64 = 16.0;

/// Appended to the stem of a file's name.
pub const OVERVIEW: &str = "-overview";
pub const GROWTH: &str = "-growth";

/// Charts with what to append to the file's stem: one thread, all threads, overview, growth.
pub fn charts(report: &Report) -> Vec<(String, String)> {
    let mut charts = Vec::new();
    for threads in report.thread_counts() {
        let suffix = match threads {
            1 => String::new(),
            n => format!("-{n}-threads"),
        };
        charts.push((suffix, everything(report, threads)));
    }
    charts.push((OVERVIEW.to_owned(), overview(report)));
    if !report.growth.is_empty() {
        charts.push((GROWTH.to_owned(), curves(report)));
    }
    charts
}

struct Canvas {
    body: String,
    width: f64,
    height: f64,
}

impl Canvas {
    fn new(width: f64) -> Self {
        Self {
            body: String::new(),
            width,
            height: 0.0,
        }
    }

    fn text(&mut self, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" class="{class}" text-anchor="{anchor}">{text}</text>"#
        );
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(
            self.body,
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        );
    }

    fn bar(&mut self, corner: (f64, f64), size: (f64, f64), colour: &str, title: &str) {
        let ((x, y), (width, height)) = (corner, size);
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"><title>{title}</title></rect>"#
        );
    }

    /// Small text on ground of its own, so that no line runs through it.
    fn value(&mut self, corner: (f64, f64), height: f64, text: &str) {
        let ((x, y), width) = (corner, 5.5 * text.len() as f64 + 3.0);
        let _ = writeln!(
            self.body,
            r#"<rect class="ground" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"/>"#
        );
        self.text(x + 2.0, y + height / 2.0 + 3.0, "value", "start", text);
    }

    fn curve(&mut self, points: &[(f64, f64)], colour: &str) {
        self.polyline(points, colour, "");
    }

    /// A curve of dashes, as SVG has them.
    fn dashed(&mut self, points: &[(f64, f64)], colour: &str, dash: &str) {
        self.polyline(points, colour, &format!(r#" stroke-dasharray="{dash}""#));
    }

    fn polyline(&mut self, points: &[(f64, f64)], colour: &str, more: &str) {
        let points: Vec<_> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let points = points.join(" ");
        let _ = writeln!(
            self.body,
            r#"<polyline class="curve" stroke="{colour}"{more} points="{points}"/>"#
        );
    }

    /// Title, conditions and legend; the rest goes below the height that is returned.
    fn head(&mut self, title: &str, conditions: &[String], names: &[(&str, &str)]) -> f64 {
        self.text(MARGIN, 26.0, "title", "start", title);
        let mut y = 44.0;
        for conditions in conditions {
            for line in wrapped(conditions, (self.width - 2.0 * MARGIN) / 5.4) {
                self.text(MARGIN, y, "small", "start", &line);
                y += 13.0;
            }
        }
        y += 8.0;
        let mut x = MARGIN;
        for (name, colour) in names {
            let width = 28.0 + 5.9 * name.len() as f64;
            if x + width > self.width - MARGIN {
                x = MARGIN;
                y += 16.0;
            }
            self.bar((x, y - 8.0), (10.0, 10.0), colour, name);
            self.text(x + 14.0, y + 1.0, "", "start", name);
            x += width;
        }
        y + 24.0
    }

    fn finish(self) -> String {
        let Self {
            body,
            width,
            height,
        } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\">\n{STYLE}\n\
             <rect class=\"ground\" width=\"100%\" height=\"100%\"/>\n{body}</svg>\n"
        )
    }
}

fn wrapped(text: &str, most: f64) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if !line.is_empty() && (line.len() + word.len()) as f64 >= most => {
                lines.push(word.to_owned());
            }
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) => *line += &format!(" {word}"),
            None => {}
        }
    }
    lines
}

/// What occurs, in the order of first occurrence.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}

/// Some of the rows, side by side with others.
struct Panel<'a> {
    name: String,
    rows: Vec<&'a Measurement>,
}

/// Share of the update pass: a panel per element type, a group of bars per case and pairing.
fn everything(report: &Report, threads: usize) -> String {
    let rows = || report.chosen().filter(|m| m.threads == threads);
    let panels = distinct(rows().map(|m| m.dtype.as_str()))
        .into_iter()
        .map(|dtype| Panel {
            name: dtype.to_owned(),
            rows: rows().filter(|m| m.dtype == dtype).collect(),
        });
    let title = format!(
        "Rotary embedding on the host, {}: share of the update pass's speed",
        threads_name(threads)
    );
    bars(report, &title, &panels.collect::<Vec<_>>(), 7.0)
}

/// The usual cases in the usual type and pairing: a panel per thread count.
fn overview(report: &Report) -> String {
    let panels = report.thread_counts().into_iter().map(|threads| Panel {
        name: threads_name(threads),
        rows: report
            .chosen()
            .filter(|m| m.threads == threads && m.is_usual())
            .collect(),
    });
    let title = "Rotary embedding on the host, bf16, half-split: share of the update pass's speed";
    bars(report, title, &panels.collect::<Vec<_>>(), 10.0)
}

/// Groups of bars per case and pairing. Bars of 9 and more have their values beside them, thinner
/// ones where they are phasor's or cut off.
fn bars(report: &Report, title: &str, panels: &[Panel<'_>], bar: f64) -> String {
    const LABELS: f64 = 310.0;
    const PANEL: f64 = 240.0;
    let rows = || panels.iter().flat_map(|panel| panel.rows.iter().copied());
    let mut libraries = distinct(rows().map(|m| m.library.as_str()));
    libraries.sort_by_key(|&name| (name != PHASOR, name));
    let groups = distinct(rows().map(|m| (m.case.as_str(), m.pairing.as_str())));
    let pairings = distinct(rows().map(|m| m.pairing.as_str()));
    let longest = rows()
        .map(Measurement::of_update)
        .fold(1.25, f64::max)
        .min(2.0);
    let scale = (PANEL - 50.0) / longest;

    let colours = libraries.iter().copied().zip(COLOURS.into_iter().cycle());
    let colours: Vec<(&str, &str)> = colours.collect();
    let mut canvas = Canvas::new(2.0 * MARGIN + LABELS + PANEL * panels.len().max(2) as f64);
    let top = canvas.head(title, &report.conditions(), &colours) + 22.0;

    let in_group = |m: &Measurement, group| (m.case.as_str(), m.pairing.as_str()) == group;
    let heights: Vec<f64> = groups
        .iter()
        .map(|&group| {
            let count =
                |panel: &Panel<'_>| panel.rows.iter().filter(|m| in_group(m, group)).count();
            bar * panels.iter().map(count).max().unwrap_or(0).max(3) as f64 + 12.0
        })
        .collect();
    let bottom = top + heights.iter().sum::<f64>();
    for (i, panel) in panels.iter().enumerate() {
        let left = MARGIN + LABELS + PANEL * i as f64;
        canvas.text(left, top - 22.0, "panel", "start", &panel.name);
        for step in 0..=(longest / 0.5) as usize {
            let share = 0.5 * step as f64;
            let x = left + scale * share;
            let class = if step == 2 { "limit" } else { "grid" };
            canvas.line(class, (x, top - 4.0), (x, bottom));
            canvas.text(x, top - 8.0, "small", "middle", &format!("{share:.1}"));
        }
    }
    let mut y = top;
    for (&group, height) in groups.iter().zip(&heights) {
        let (case, pairing) = group;
        canvas.text(MARGIN, y + 12.0, "", "start", case);
        if pairings.len() > 1 {
            canvas.text(MARGIN, y + 25.0, "small", "start", pairing);
        }
        for (i, panel) in panels.iter().enumerate() {
            let left = MARGIN + LABELS + PANEL * i as f64;
            let mut at = y + 4.0;
            for (name, colour) in &colours {
                let mut rows = panel.rows.iter();
                let Some(m) = rows.find(|m| m.library == *name && in_group(m, group)) else {
                    continue;
                };
                let share = m.of_update();
                let width = (scale * share.min(longest)).max(0.5);
                let title = format!(
                    "{name}: {share:.2} of {UPDATE}, {:.2} of {MEMCPY}",
                    m.of_memcpy()
                );
                canvas.bar((left, at), (width, bar - 1.0), colour, &title);
                if *name == PHASOR || bar >= 9.0 || share > longest {
                    let value = format!("{share:.2}");
                    canvas.value((left + width + 1.0, at), bar - 1.0, &value);
                }
                at += bar;
            }
        }
        y += height;
    }
    canvas.height = bottom + MARGIN;
    canvas.finish()
}

/// Time of a call along each axis, both logarithmic.
fn curves(report: &Report) -> String {
    const WIDTH: f64 = 420.0;
    const HEIGHT: f64 = 240.0;
    let mut canvas = Canvas::new(2.0 * MARGIN + 2.0 * WIDTH);
    let names = [
        (PHASOR, COLOURS[0]),
        (UPDATE, COLOURS[1]),
        (MEMCPY, COLOURS[2]),
    ];
    let threads = report.machine.threads;
    let title = format!(
        "phasor on the host: time of a call, bf16, half-split, in place, cold; threads: {threads} or as said"
    );
    let top = canvas.head(&title, &report.conditions(), &names);
    for (panel, axis) in axes(&report.growth).into_iter().enumerate() {
        let left = MARGIN + WIDTH * (panel % 2) as f64 + 50.0;
        let top = top + HEIGHT * (panel / 2) as f64 + 20.0;
        let (width, height) = (WIDTH - 80.0, HEIGHT - 70.0);
        let points: Vec<_> = report
            .growth
            .iter()
            .filter(|point| point.axis == axis)
            .collect();
        let times = || points.iter().flat_map(|p| [p.phasor, p.memcpy, p.update]);
        let lowest = times().fold(f64::MAX, f64::min).log10().floor();
        let highest = times().fold(0.0, f64::max).log10().ceil().max(lowest + 1.0);
        let log = |x: usize| (x as f64).log2();
        let (first, last) = (points.first(), points.last());
        let (first, last) = (
            first.map_or(0.0, |p| log(p.x)),
            last.map_or(0.0, |p| log(p.x)),
        );
        let span = (last - first).max(1e-9);
        let at_x = |x: usize| left + width * (log(x) - first) / span;
        let at_y = |s: f64| top + height * (highest - s.log10()) / (highest - lowest);

        canvas.text(left - 50.0, top - 10.0, "panel", "start", axis);
        for decade in lowest as i32..=highest as i32 {
            let y = at_y(10f64.powi(decade));
            canvas.line("grid", (left, y), (left + width, y));
            let (value, unit) = match decade {
                ..-6 => (decade + 9, "ns"),
                -6..-3 => (decade + 6, "µs"),
                -3..0 => (decade + 3, "ms"),
                _ => (decade, "s"),
            };
            let label = format!("{} {unit}", 10i64.pow(value.max(0) as u32));
            canvas.text(left - 5.0, y + 4.0, "small", "end", &label);
        }
        // As many labels as fit.
        let step = points.len().div_ceil(8);
        for point in points.iter().step_by(step) {
            let x = at_x(point.x);
            canvas.text(
                x,
                top + height + 16.0,
                "small",
                "middle",
                &point.x.to_string(),
            );
        }
        for (i, (_, colour)) in names.iter().enumerate() {
            let curve = points
                .iter()
                .map(|p| (at_x(p.x), at_y([p.phasor, p.update, p.memcpy][i])));
            canvas.curve(&curve.collect::<Vec<_>>(), colour);
        }
    }
    let panels = axes(&report.growth).len();
    canvas.height = top + HEIGHT * panels.div_ceil(2) as f64 + MARGIN;
    canvas.finish()
}

/// Time of a call on a GPU against tokens, both logarithmic: q and k of Llama-3-8B in bf16.
pub fn gpu(results: &Results) -> String {
    const LEFT: f64 = 50.0;
    const WIDTH: f64 = 560.0;
    const HEIGHT: f64 = 460.0;
    const LEGEND: f64 = 300.0;
    let rows: Vec<&Row> = results.rows.iter().filter(|row| is_drawn(row)).collect();
    let mut lines = distinct(rows.iter().map(|row| line(row)));
    lines.sort_by_key(|(name, _)| match *name {
        PHASOR => 0,
        COPY_KERNEL => 1,
        _ => 2,
    });

    let mut canvas = Canvas::new(2.0 * MARGIN + LEFT + WIDTH + LEGEND);
    let title = "Rotary embedding on a GPU: time of a call against tokens";
    let mut conditions = Vec::from(gpu::conditions(results));
    conditions.insert(
        0,
        "32 query and 8 key heads of 128, bf16, half-split, in place; replays of a CUDA graph, on \
         buffers that do not fit into L2 together."
            .to_owned(),
    );
    let top = canvas.head(title, &conditions, &[]) - 8.0;
    let left = MARGIN + LEFT;
    let (right, bottom) = (left + WIDTH, top + HEIGHT);
    let tokens = || rows.iter().map(|row| row.tokens);
    let log = |x: usize| (x as f64).log2();
    let (first, last) = (
        tokens().min().map_or(0.0, log),
        tokens().max().map_or(1.0, log),
    );
    let span = (last - first).max(1.0);
    let times = || rows.iter().map(|row| row.us.log10());
    let lowest = times().fold(f64::MAX, f64::min).min(0.0) - 0.1;
    let highest = times().fold(f64::MIN, f64::max).max(1.0) + 0.1;
    let at_x = |x: usize| left + WIDTH * (log(x) - first) / span;
    let at_y = |us: f64| top + HEIGHT * (highest - us.log10()) / (highest - lowest);

    for decade in lowest.floor() as i32..=highest as i32 {
        for step in [1.0, 2.0, 5.0] {
            let us = step * 10f64.powi(decade);
            if (lowest..=highest).contains(&us.log10()) {
                let label = match decade {
                    ..0 => format!("{us:.1} µs"),
                    _ => format!("{} µs", thousands(us as usize)),
                };
                canvas.line("grid", (left, at_y(us)), (right, at_y(us)));
                canvas.text(left - 6.0, at_y(us) + 4.0, "small", "end", &label);
            }
        }
    }
    for x in distinct(tokens()) {
        let at = at_x(x);
        canvas.line("grid", (at, top), (at, bottom));
        canvas.text(at, bottom + 16.0, "small", "middle", &thousands(x));
    }
    canvas.text(left + WIDTH / 2.0, bottom + 34.0, "", "middle", "tokens");

    // A colour for each who; a dash for each launch, and another where colours repeat.
    let names = distinct(lines.iter().map(|line| line.0));
    for (i, &(name, launch)) in lines.iter().enumerate().rev() {
        let number = names.iter().position(|&other| other == name).unwrap_or(0);
        let colour = COLOURS[number % COLOURS.len()];
        let dash = match (launch, number < COLOURS.len()) {
            (Launch::Ordinary, true) => "none",
            (Launch::Dependent, true) => "7 3",
            (Launch::DependentSettled, true) => "2 3",
            (Launch::Ordinary, false) => "10 3 2 3",
            (_, false) => "10 3 2 3 2 3",
        };
        let mut points: Vec<(usize, f64)> = Vec::new();
        for x in distinct(tokens()) {
            let of_line = rows.iter().filter(|row| line(row) == (name, launch));
            let fastest = of_line
                .filter(|row| row.tokens == x)
                .map(|row| row.us)
                .min_by(f64::total_cmp);
            points.extend(fastest.map(|us| (x, us)));
        }
        points.sort_by_key(|&(x, _)| x);
        let curve: Vec<_> = points.iter().map(|&(x, us)| (at_x(x), at_y(us))).collect();
        canvas.dashed(&curve, colour, dash);
        let (x, y) = (right + 20.0, top + 10.0 + 17.0 * i as f64);
        canvas.dashed(&[(x, y), (x + 34.0, y)], colour, dash);
        let label = match launch {
            Launch::Ordinary => name.to_owned(),
            launch => format!("{name}; {launch}"),
        };
        canvas.text(x + 40.0, y + 4.0, "", "start", &label);
    }
    canvas.height = bottom.max(top + 17.0 * lines.len() as f64) + 34.0 + MARGIN;
    canvas.finish()
}

/// Whose line a row is on. The fastest of all copy kernels is one.
fn line(row: &Row) -> (&str, Launch) {
    match row.kind {
        Kind::Limit => (COPY_KERNEL, row.launch),
        _ => (&row.contender, row.launch),
    }
}

/// phasor, peers and copy kernels in the case that is drawn.
fn is_drawn(row: &Row) -> bool {
    row.is_headline()
        && match row.kind {
            Kind::Phasor => row.contender == PHASOR,
            Kind::Limit => row.contender.starts_with(COPY_KERNEL),
            Kind::Peer => true,
        }
}

/// Error against position, both logarithmic.
pub fn accuracy(curves: &[Curve]) -> String {
    const LEFT: f64 = 60.0;
    const WIDTH: f64 = 784.0;
    const HEIGHT: f64 = 420.0;
    const LOWEST: i32 = -9;
    const HIGHEST: i32 = 1;
    let mut canvas = Canvas::new(2.0 * MARGIN + LEFT + WIDTH);
    let names = curves.iter().map(|curve| curve.scheme.name());
    let names: Vec<(&str, &str)> = names.zip(COLOURS).collect();
    let pairs = HEAD_DIM / 2;
    let conditions = [
        format!(
            "theta {}, head_dim {HEAD_DIM}, as Llama 3. A point is the largest error of cos and sin, \
             over all {pairs} pairs and the {WINDOW} positions up to it.",
            thousands(THETA as usize)
        ),
        "Against angles in 128-bit fixed point. The formulas are those of the systems named, each \
         operation rounded correctly."
            .to_owned(),
    ];
    let title = "Rotary embedding: error of cos and sin against position";
    let top = canvas.head(title, &conditions, &names) + 8.0;
    let left = MARGIN + LEFT;
    let (right, bottom) = (left + WIDTH, top + HEIGHT);
    let last = curves.iter().flat_map(|curve| &curve.points);
    let last = last
        .map(|&(position, _)| position)
        .max()
        .unwrap_or(1)
        .max(2);
    let at_x = |position: i64| left + WIDTH * (position as f64).log10() / (last as f64).log10();
    let at_y = |error: f64| {
        let decades = f64::from(HIGHEST) - error.log10();
        top + HEIGHT * decades.clamp(0.0, f64::from(HIGHEST - LOWEST)) / f64::from(HIGHEST - LOWEST)
    };

    for decade in LOWEST..=HIGHEST {
        let y = at_y(10f64.powi(decade));
        canvas.line("grid", (left, y), (right, y));
        canvas.text(left - 6.0, y + 4.0, "small", "end", &power_of_ten(decade));
    }
    for decade in 0..=last.ilog10() {
        let x = at_x(10i64.pow(decade));
        canvas.line("grid", (x, top), (x, bottom));
        let label = power_of_ten(decade as i32);
        canvas.text(x, bottom + 16.0, "small", "middle", &label);
    }
    canvas.text(left + WIDTH / 2.0, bottom + 34.0, "", "middle", "position");
    for (context, name) in [
        (8 << 10, "8k tokens"),
        (128 << 10, "128k"),
        (1 << 20, "1M"),
        (10 << 20, "10M"),
    ] {
        let x = at_x(context);
        canvas.line("guide", (x, top), (x, bottom));
        canvas.text(x, top - 5.0, "small", "middle", name);
    }
    // Half a unit in the last place of the values in 0.5..1.
    for (error, name) in [
        (2f64.powi(-9), "one rounding to bf16"),
        (2f64.powi(-25), "one rounding to f32"),
    ] {
        let y = at_y(error);
        canvas.line("guide", (left, y), (right, y));
        canvas.text(right - 4.0, y + 13.0, "small", "end", name);
    }
    // phasor's last, above the others.
    for (curve, (_, colour)) in curves.iter().zip(&names).rev() {
        let points = curve.points.iter();
        let points = points.map(|&(position, error)| (at_x(position), at_y(error)));
        canvas.curve(&points.collect::<Vec<_>>(), colour);
    }
    canvas.height = bottom + 34.0 + MARGIN;
    canvas.finish()
}

/// `10⁻³` of -3.
fn power_of_ten(exponent: i32) -> String {
    let raised = |c| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        // The others are in order.
        _ => char::from_u32(0x2070 + u32::from(c) - u32::from('0')).unwrap_or(c),
    };
    let exponent = exponent.to_string();
    format!("10{}", exponent.chars().map(raised).collect::<String>())
}
