//! Plots as SVG text, to stand inside a page whose style sheet ([`super::html`]) colours them.

use std::fmt::Write;

use super::statistics::Summary;
use super::table::figure;

/// Width of a plot; heights follow from what is in it.
const WIDTH: f64 = 760.0;
/// Width of the names at the left of bars.
const NAMES: f64 = 120.0;
/// Room at the right of the longest bar for its figure.
const FIGURES: f64 = 130.0;
/// Height of a bar and of the gap to the next.
const BAR: f64 = 16.0;
const GAP: f64 = 6.0;
/// Height of a curve plot's drawing area, and what is around it.
const CURVES: f64 = 260.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 34.0;
/// Least distance of two names at the ends of curves.
const LINE: f64 = 14.0;

/// One bar: its name, its colour's index, and its figure or why it has none.
pub(super) struct Bar<'a> {
    pub(super) name: &'a str,
    pub(super) color: usize,
    pub(super) value: Result<Summary, &'a str>,
}

/// Text as XML.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Bars of the medians from 0, each with a line over its range.
pub(super) fn bars(bars: &[Bar<'_>], unit: &str) -> String {
    let max = bars
        .iter()
        .filter_map(|bar| bar.value.ok())
        .map(|summary| summary.max)
        .fold(0.0, f64::max);
    let scale = (WIDTH - NAMES - FIGURES) / if max > 0.0 { max } else { 1.0 };
    let height = bars.len() as f64 * (BAR + GAP) + GAP;
    let mut svg = open(height, "bars");
    for (index, bar) in bars.iter().enumerate() {
        let top = GAP + index as f64 * (BAR + GAP);
        let (middle, text) = (top + BAR / 2.0, top + BAR - 4.0);
        let name = escaped(bar.name);
        let _ = write!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{text:.1}\">{name}</text>",
            NAMES - 8.0
        );
        match bar.value {
            Ok(Summary {
                median, min, max, ..
            }) => {
                let (width, low, high) = (median * scale, min * scale, max * scale);
                let shown = figure(median);
                let _ = write!(
                    svg,
                    "<rect class=\"c{}\" x=\"{NAMES}\" y=\"{top:.1}\" width=\"{width:.1}\" \
                     height=\"{BAR}\" rx=\"2\"><title>{name}: {shown} {unit} ({} to {})</title></rect>",
                    bar.color,
                    figure(min),
                    figure(max)
                );
                if max > min {
                    let _ = write!(
                        svg,
                        "<path class=\"range\" d=\"M{:.1} {middle:.1}H{:.1}\"/>",
                        NAMES + low,
                        NAMES + high
                    );
                }
                let _ = write!(
                    svg,
                    "<text class=\"figure\" x=\"{:.1}\" y=\"{text:.1}\">{shown} {unit}</text>",
                    NAMES + width.max(high) + 6.0
                );
            }
            Err(reason) => {
                let _ = write!(
                    svg,
                    "<text class=\"none\" x=\"{NAMES}\" y=\"{text:.1}\">{}</text>",
                    escaped(reason)
                );
            }
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// A line of points, by x.
pub(super) struct Curve<'a> {
    pub(super) name: &'a str,
    pub(super) color: usize,
    pub(super) points: Vec<(f64, Summary)>,
}

/// Logarithmic axes, and where they put a value.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    /// Those that all points fit into; none where there is none.
    fn around(points: &[(f64, f64)]) -> Option<Self> {
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold(None, |range, value| match range {
                None => Some((value, value)),
                Some((min, max)) => Some((value.min(min), value.max(max))),
            })
        };
        let (low, high) = range(&mut points.iter().map(|&(_, y)| y).filter(|&y| y > 0.0))?;
        Some(Self {
            x: range(&mut points.iter().map(|&(x, _)| x))?,
            y: (tick_below(low), tick_above(high)),
        })
    }

    fn x_at(&self, x: f64) -> f64 {
        LEFT + share(x, self.x) * (WIDTH - LEFT - RIGHT)
    }

    fn y_at(&self, y: f64) -> f64 {
        TOP + (1.0 - share(y.max(self.y.0), self.y)) * CURVES
    }

    /// A grid with the values beside it: round ones of y, and every x that occurs.
    fn draw(&self, svg: &mut String, points: &[(f64, f64)], x_name: &str) {
        for tick in ticks(self.y.0, self.y.1) {
            let (y, end) = (self.y_at(tick), WIDTH - RIGHT);
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{end:.1}\"/>\
                 <text class=\"name\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                LEFT - 8.0,
                y + 4.0,
                figure_of_axis(tick)
            );
        }
        let mut columns: Vec<_> = points.iter().map(|&(x, _)| x).collect();
        columns.sort_by(f64::total_cmp);
        columns.dedup();
        for x in columns {
            let (at, bottom) = (self.x_at(x), TOP + CURVES);
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{at:.1} {TOP}V{bottom}\"/>\
                 <text class=\"axis\" x=\"{at:.1}\" y=\"{:.1}\">{} {x_name}</text>",
                bottom + 20.0,
                figure_of_axis(x)
            );
        }
    }
}

/// How far a value is from the low end of a range to its high end.
fn share(value: f64, (min, max): (f64, f64)) -> f64 {
    match max > min {
        true => (value / min).ln() / (max / min).ln(),
        false => 0.5,
    }
}

/// Curves of the medians, with logarithmic axes: x and y may span powers of ten.
pub(super) fn curves(curves: &[Curve<'_>], unit: &str, x_name: &str) -> String {
    let points = curves.iter().flat_map(|curve| &curve.points);
    let points: Vec<_> = points.map(|&(x, y)| (x, y.median)).collect();
    let Some(axes) = Axes::around(&points) else {
        return String::new();
    };
    let mut svg = open(TOP + CURVES + BOTTOM, "curves");
    axes.draw(&mut svg, &points, x_name);
    let mut ends = Vec::new();
    for curve in curves {
        let (name, color) = (escaped(curve.name), curve.color);
        let (mut line, mut dots) = (String::new(), String::new());
        for &(flows, Summary { median, .. }) in &curve.points {
            let (x, y) = (axes.x_at(flows), axes.y_at(median));
            let _ = write!(line, "{x:.1},{y:.1} ");
            let _ = write!(
                dots,
                "<circle class=\"c{color}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\">\
                 <title>{name}, {} {x_name}: {} {unit}</title></circle>",
                figure_of_axis(flows),
                figure(median)
            );
        }
        let line = line.trim_end();
        let _ = write!(
            svg,
            "<polyline class=\"l{color}\" points=\"{line}\"/>{dots}"
        );
        let last = curve.points.last();
        ends.extend(last.map(|&(x, y)| (axes.x_at(x), axes.y_at(y.median), (name, color))));
    }
    for (x, y, (name, color)) in apart(ends) {
        let (x, y) = (x + 10.0, y + 4.0);
        let _ = write!(
            svg,
            "<text class=\"end t{color}\" x=\"{x:.1}\" y=\"{y:.1}\">{name}</text>"
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn open(height: f64, class: &str) -> String {
    format!("<svg class=\"{class}\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">")
}

/// Moves names down until none stands on another.
fn apart<T>(mut ends: Vec<(f64, f64, T)>) -> Vec<(f64, f64, T)> {
    ends.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut free = 0.0;
    for (_, y, _) in &mut ends {
        *y = y.max(free);
        free = *y + LINE;
    }
    ends
}

/// The steps of an axis: 1, 2 and 5 times a power of ten.
fn step(index: i32) -> f64 {
    [1.0, 2.0, 5.0][index.rem_euclid(3) as usize] * 10_f64.powi(index.div_euclid(3))
}

/// The last step that is not above.
fn tick_below(value: f64) -> f64 {
    (-30..40)
        .rev()
        .map(step)
        .find(|&step| step <= value)
        .unwrap_or(value)
}

/// The first step that is not below.
fn tick_above(value: f64) -> f64 {
    (-30..40)
        .map(step)
        .find(|&step| step >= value)
        .unwrap_or(value)
}

fn ticks(min: f64, max: f64) -> impl Iterator<Item = f64> {
    (-30..40)
        .map(step)
        .filter(move |&step| step >= min && step <= max)
}

/// As short as it is exact: an axis has round values.
fn figure_of_axis(value: f64) -> String {
    match value {
        1.0.. => figure(value.round())
            .trim_end_matches(".00")
            .trim_end_matches(".0")
            .to_owned(),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(median: f64) -> Summary {
        Summary {
            median,
            min: median * 0.9,
            max: median * 1.1,
            count: 2,
        }
    }

    #[test]
    fn a_bar_is_as_long_as_its_figure() {
        let text = bars(
            &[
                Bar {
                    name: "a<b",
                    color: 0,
                    value: Ok(summary(10.0)),
                },
                Bar {
                    name: "half",
                    color: 1,
                    value: Ok(summary(5.0)),
                },
                Bar {
                    name: "none",
                    color: 2,
                    value: Err("why & how"),
                },
            ],
            "Gbit/s",
        );
        let width = |text: &str| -> f64 {
            let (_, rest) = text.split_once("width=\"").unwrap();
            rest.split_once('"').unwrap().0.parse().unwrap()
        };
        let rects: Vec<_> = text.split("<rect").skip(1).map(width).collect();
        assert_eq!(rects.len(), 2);
        assert!((rects[0] - 2.0 * rects[1]).abs() < 0.2, "{rects:?}");
        assert!(text.contains("a&lt;b") && text.contains("why &amp; how"));
        assert!(text.starts_with("<svg") && text.ends_with("</svg>\n"));
    }

    #[test]
    fn curves_have_a_line_each_and_stay_inside() {
        let curve = |name, color, factor: f64| Curve {
            name,
            color,
            points: [10.0, 100.0, 1_000.0]
                .map(|x| (x, summary(f64::log10(x) * factor)))
                .to_vec(),
        };
        let text = curves(&[curve("a", 0, 1.0), curve("b", 1, 40.0)], "µs", "flows");
        assert_eq!(text.matches("<polyline").count(), 2);
        assert_eq!(text.matches("<circle").count(), 6);
        assert!(text.contains(">1,000 flows<"));
        for part in text.split("cy=\"").skip(1) {
            let y: f64 = part.split_once('"').unwrap().0.parse().unwrap();
            assert!((TOP..=TOP + CURVES).contains(&y), "{y}");
        }
        assert_eq!(curves(&[], "µs", "flows"), "");
    }

    #[test]
    fn names_stand_apart() {
        let ends = apart(vec![(0.0, 50.0, 'b'), (0.0, 48.0, 'a'), (0.0, 200.0, 'c')]);
        let ys: Vec<_> = ends.iter().map(|&(_, y, name)| (name, y)).collect();
        assert_eq!(ys, [('a', 48.0), ('b', 62.0), ('c', 200.0)]);
    }

    #[test]
    fn axes_end_at_round_values() {
        assert_eq!((tick_below(37.0), tick_above(37.0)), (20.0, 50.0));
        let found: Vec<_> = ticks(1.0, 20.0).collect();
        assert_eq!(found, [1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(
            [0.5, 5.0, 20.0, 1_000.0].map(figure_of_axis),
            ["0.5", "5", "20", "1,000"]
        );
    }
}
