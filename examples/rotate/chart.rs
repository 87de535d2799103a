//! Curves over logarithmic axes, as SVG.

use std::fmt::Write;

use super::report::thousands;

pub struct Chart {
    pub title: &'static str,
    pub across: &'static str,
    pub curves: Vec<Curve>,
    /// A level to compare with.
    pub guide: Option<(&'static str, f64)>,
}

pub struct Curve {
    pub name: &'static str,
    pub colour: &'static str,
    /// Both positive, or the second 0.
    pub points: Vec<(f64, f64)>,
}

const STYLE: &str = "<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}\
.small{font-size:11px;fill:#59636e}.grid{stroke:#d8dee4}.guide{stroke:#59636e;stroke-dasharray:5 4}\
.curve{fill:none;stroke-width:2;stroke-linejoin:round}</style>";

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 320.0;
/// Of a chart, around what is drawn.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 52.0;

/// Charts side by side.
pub fn svg(charts: &[Chart]) -> String {
    let width = WIDTH * charts.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{HEIGHT}\" \
         viewBox=\"0 0 {width} {HEIGHT}\">\n{STYLE}\n\
         <rect width=\"{width}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    for (i, chart) in charts.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = writeln!(svg, "<g transform=\"translate({})\">", WIDTH * i as f64);
        chart.draw(&mut svg);
        svg += "</g>\n";
    }
    svg + "</svg>\n"
}

impl Chart {
    fn draw(&self, svg: &mut String) {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let last = points().map(|&(x, _)| x).fold(2.0, f64::max);
        let guide = self.guide.map(|(_, y)| y);
        let heights = points().map(|&(_, y)| y).chain(guide).filter(|&y| y > 0.0);
        let (low, high) = heights.fold((f64::MAX, 0.0), |(low, high), y| (y.min(low), y.max(high)));
        let (low, high) = if high > 0.0 { (low, high) } else { (1.0, 1.0) };
        // Whole decades.
        let (floor, ceiling) = (low.log10().floor(), high.log10().floor() + 1.0);

        let at_x = |x: f64| LEFT + (WIDTH - LEFT - RIGHT) * x.log2() / last.log2();
        let at_y = |y: f64| {
            let part = (y.log10().max(floor) - floor) / (ceiling - floor);
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part
        };
        let (left, right) = (at_x(1.0), at_x(last));
        let (top, bottom) = (TOP, HEIGHT - BOTTOM);

        text(svg, (left, 22.0), "title", "start", self.title);
        let decades = (ceiling - floor) as i32;
        for decade in (0..=decades).step_by((decades as usize).div_ceil(8).max(1)) {
            let exponent = floor as i32 + decade;
            let y = at_y(10f64.powi(exponent));
            line(svg, "grid", (left, y), (right, y));
            let label = match exponent {
                0 => "1".to_string(),
                _ => format!("1e{exponent}"),
            };
            text(svg, (left - 6.0, y + 4.0), "small", "end", &label);
        }
        for exponent in (0..=last.log2() as i32).step_by(4) {
            let position = 2f64.powi(exponent);
            let x = at_x(position);
            line(svg, "grid", (x, top), (x, bottom));
            let label = match exponent {
                0..20 => thousands(position as i64),
                _ => format!("{}M", 1i64 << (exponent - 20)),
            };
            text(svg, (x, bottom + 16.0), "small", "middle", &label);
        }
        let middle = (left + right) / 2.0;
        text(svg, (middle, bottom + 36.0), "small", "middle", self.across);

        if let Some((name, y)) = self.guide.filter(|&(_, y)| y > 0.0) {
            let y = at_y(y);
            line(svg, "guide", (left, y), (right, y));
            text(svg, (left + 6.0, y - 5.0), "small", "start", name);
        }
        for curve in &self.curves {
            let points: Vec<String> = curve
                .points
                .iter()
                .map(|&(x, y)| format!("{:.1},{:.1}", at_x(x), at_y(y)))
                .collect();
            let _ = writeln!(
                svg,
                "<polyline class=\"curve\" stroke=\"{}\" points=\"{}\"/>",
                curve.colour,
                points.join(" ")
            );
            if let Some(&(x, y)) = curve.points.last() {
                let _ = writeln!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" \
                     style=\"fill:{};font-weight:600\">{}</text>",
                    at_x(x) - 4.0,
                    at_y(y) - 8.0,
                    curve.colour,
                    curve.name
                );
            }
        }
    }
}

fn text(svg: &mut String, (x, y): (f64, f64), class: &str, anchor: &str, text: &str) {
    let _ = writeln!(
        svg,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}

fn line(svg: &mut String, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}
