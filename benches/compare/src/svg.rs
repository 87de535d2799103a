//! Charts as SVG, by hand: bars of every library per case, and curves of growth.

use crate::limits::{MEMCPY, UPDATE};
use crate::phasor::PHASOR;
use crate::report::{Measurement, Report, axes};
use std::fmt::Write;

/// Colours that can be told apart on light and dark ground; phasor's is the first.
const COLOURS: [&str; 8] = [
    "#d9480f", "#4c8dd6", "#2f9e6e", "#b8860b", "#9067c6", "#c2559d", "#2aa1b3", "#8a8f98",
];

const STYLE: &str = "<style>\
text{font:11px system-ui,sans-serif;fill:#1f2328}\
.ground{fill:#fff}.title{font-size:15px;font-weight:600}.panel{font-weight:600}\
.small{font-size:10px;fill:#59636e}.value{font-size:9px}\
.grid{stroke:#d1d9e0;stroke-width:1}.limit{stroke:#1f2328;stroke-width:1.5}\
.curve{fill:none;stroke-width:2}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ground{fill:#0d1117}\
.small{fill:#9198a1}.grid{stroke:#3d444d}.limit{stroke:#e6edf3}}</style>";

const MARGIN: f64 = 16.0;

/// Charts with what to append to the file's stem: one thread, all threads, growth.
pub fn charts(report: &Report) -> Vec<(String, String)> {
    let mut charts = Vec::new();
    for threads in report.thread_counts() {
        let suffix = match threads {
            1 => String::new(),
            n => format!("-{n}-threads"),
        };
        charts.push((suffix, bars(report, threads)));
    }
    if !report.growth.is_empty() {
        charts.push(("-growth".to_owned(), curves(report)));
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

    fn curve(&mut self, points: &[(f64, f64)], colour: &str) {
        let points: Vec<_> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let points = points.join(" ");
        let _ = writeln!(
            self.body,
            r#"<polyline class="curve" stroke="{colour}" points="{points}"/>"#
        );
    }

    /// Title, conditions and legend; the rest goes below the height that is returned.
    fn head(&mut self, title: &str, report: &Report, names: &[(&str, &str)]) -> f64 {
        self.text(MARGIN, 26.0, "title", "start", title);
        let mut y = 44.0;
        for conditions in report.conditions() {
            for line in wrapped(&conditions, (self.width - 2.0 * MARGIN) / 5.0) {
                self.text(MARGIN, y, "small", "start", &line);
                y += 13.0;
            }
        }
        y += 8.0;
        let mut x = MARGIN;
        for (name, colour) in names {
            let width = 24.0 + 6.4 * name.len() as f64;
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

/// Share of the update pass: a panel per element type, a group of bars per case and pairing.
fn bars(report: &Report, threads: usize) -> String {
    const LABELS: f64 = 290.0;
    const PANEL: f64 = 230.0;
    const BAR: f64 = 7.0;
    let rows: Vec<&Measurement> = report
        .measurements
        .iter()
        .filter(|m| m.threads == threads && !m.is_forced())
        .collect();
    let mut libraries = distinct(rows.iter().map(|m| m.library.as_str()));
    libraries.sort_by_key(|&name| (name != PHASOR, name));
    let dtypes = distinct(rows.iter().map(|m| m.dtype.as_str()));
    let groups = distinct(rows.iter().map(|m| (m.case.as_str(), m.pairing.as_str())));
    let longest = rows
        .iter()
        .map(|m| m.of_update())
        .fold(1.25, f64::max)
        .min(2.0);
    let scale = (PANEL - 50.0) / longest;

    let colours = libraries.iter().copied().zip(COLOURS.into_iter().cycle());
    let colours: Vec<(&str, &str)> = colours.collect();
    let mut canvas = Canvas::new(2.0 * MARGIN + LABELS + PANEL * dtypes.len() as f64);
    let plural = if threads == 1 { "" } else { "s" };
    let title = format!(
        "Rotary embedding on the host, {threads} thread{plural}: share of an update pass's speed"
    );
    let top = canvas.head(&title, report, &colours) + 14.0;

    let heights: Vec<f64> = groups
        .iter()
        .map(|&group| {
            let bars = dtypes.iter().map(|&dtype| {
                let in_group = |m: &&&Measurement| (m.case.as_str(), m.pairing.as_str()) == group;
                rows.iter()
                    .filter(in_group)
                    .filter(|m| m.dtype == dtype)
                    .count()
            });
            BAR * bars.max().unwrap_or(0).max(3) as f64 + 10.0
        })
        .collect();
    let bottom = top + heights.iter().sum::<f64>();
    for (panel, dtype) in dtypes.iter().enumerate() {
        let left = MARGIN + LABELS + PANEL * panel as f64;
        canvas.text(left, top - 20.0, "panel", "start", dtype);
        for step in 0..=(longest / 0.5) as usize {
            let x = left + scale * 0.5 * step as f64;
            let class = if step == 2 { "limit" } else { "grid" };
            canvas.line(class, (x, top - 4.0), (x, bottom));
            canvas.text(
                x,
                top - 7.0,
                "small",
                "middle",
                &format!("{:.1}", 0.5 * step as f64),
            );
        }
    }
    let mut y = top;
    for (&(case, pairing), height) in groups.iter().zip(&heights) {
        canvas.text(MARGIN, y + 12.0, "", "start", case);
        canvas.text(MARGIN, y + 25.0, "small", "start", pairing);
        for (panel, dtype) in dtypes.iter().enumerate() {
            let left = MARGIN + LABELS + PANEL * panel as f64;
            let mut at = y + 4.0;
            for (name, colour) in &colours {
                let found = rows.iter().find(|m| {
                    m.library == *name
                        && m.case == case
                        && m.pairing == pairing
                        && m.dtype == *dtype
                });
                let Some(m) = found else { continue };
                let width = (scale * m.of_update().min(longest)).max(0.5);
                let title = format!(
                    "{name}: {:.2} of {UPDATE}, {:.2} of {MEMCPY}",
                    m.of_update(),
                    m.of_memcpy()
                );
                canvas.bar((left, at), (width, BAR - 1.0), colour, &title);
                if *name == PHASOR {
                    let value = format!("{:.2}", m.of_update());
                    canvas.text(left + width + 3.0, at + BAR - 1.0, "value", "start", &value);
                }
                at += BAR;
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
    let top = canvas.head(&title, report, &names);
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

        canvas.text(left, top - 8.0, "panel", "start", axis);
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
