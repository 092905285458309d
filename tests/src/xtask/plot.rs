//! Plots, as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

/// Size of one panel, in pixels.
const PANEL: (u32, u32) = (420, 340);
/// Size of a plot of lines, in pixels.
const LINES: (u32, u32) = (900, 420);
/// How many times longer the x axis of a plot of lines is than its data, to have room for the legend.
const LEGEND: f64 = 1.5;
/// Beyond this ratio of the highest value to the lowest a plot of lines is logarithmic.
const SPREAD: f64 = 8.0;
/// Space that a bar leaves on each side, as a share of its slot.
const GAP: f64 = 0.15;

/// A panel of labelled bars.
pub(crate) struct Bars {
    /// What is shown, with its unit.
    pub(crate) title: &'static str,
    /// One bar each.
    pub(crate) values: Vec<(String, f64)>,
}

/// Draws panels side by side.
pub(crate) fn bars(path: &Path, title: &str, panels: &[Bars]) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| anyhow!("draw {}: {e}", path.display());
    let size = (PANEL.0 * panels.len() as u32, PANEL.1);
    let area = SVGBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let area = area.titled(title, ("sans-serif", 20)).map_err(|e| failed(&e))?;
    for (panel, area) in panels.iter().zip(area.split_evenly((1, panels.len()))) {
        let count = panel.values.len() as f64;
        let top = panel.values.iter().map(|(_, value)| *value).fold(0.0, f64::max) * 1.1;
        let mut chart = ChartBuilder::on(&area)
            .caption(panel.title, ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(30)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..count, 0.0..top.max(1.0))
            .map_err(|e| failed(&e))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_label_formatter(&|value| format!("{value:.0}"))
            .draw()
            .map_err(|e| failed(&e))?;
        for (n, (label, value)) in panel.values.iter().enumerate() {
            let (left, right) = (n as f64 + GAP, (n + 1) as f64 - GAP);
            let color = Palette99::pick(n).to_rgba();
            chart
                .draw_series([Rectangle::new([(left, 0.0), (right, *value)], color.filled())])
                .map_err(|e| failed(&e))?;
            let style = ("sans-serif", 12).into_font();
            chart
                .draw_series([
                    Text::new(label.clone(), (left, -top * 0.04), style.clone()),
                    Text::new(format!("{value:.0}"), (left, *value + top * 0.04), style),
                ])
                .map_err(|e| failed(&e))?;
        }
    }
    area.present().map_err(|e| failed(&e))
}

/// A line of points.
pub(crate) struct Series {
    /// In the legend.
    pub(crate) name: String,
    /// By x.
    pub(crate) points: Vec<(u32, f64)>,
}

/// Draws lines over numbers that double, such as depths. The y axis begins at 0, or is logarithmic if a
/// line could not be told from 0 otherwise.
pub(crate) fn lines(path: &Path, title: &str, x: &str, series: &[Series]) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| anyhow!("draw {}: {e}", path.display());
    let values = || series.iter().flat_map(|line| line.points.iter().map(|(_, y)| y.max(1.0)));
    let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(1.0, f64::max));
    let logarithmic = low < high / SPREAD;
    let height = |y: f64| if logarithmic { y.max(1.0).log10() } else { y };
    let range =
        if logarithmic { low.log10().floor()..high.log10().ceil() } else { 0.0..high * 1.1 };
    let y_label = |y: &f64| match logarithmic {
        true if y.fract() != 0.0 => String::new(),
        true => short(10_f64.powf(*y)),
        false => short(*y),
    };
    let mut ticks: Vec<u32> =
        series.iter().flat_map(|line| line.points.iter().map(|(x, _)| *x)).collect();
    ticks.sort_unstable();
    ticks.dedup();
    let place = |x: u32| ticks.iter().position(|tick| *tick == x).unwrap_or(0) as f64;
    let x_label = |x: &f64| {
        let tick = (x.fract() == 0.0 && *x >= 0.0).then(|| ticks.get(*x as usize)).flatten();
        tick.map_or_else(String::new, u32::to_string)
    };
    let area = SVGBackend::new(path, LINES).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(-0.2..ticks.len() as f64 * LEGEND, range)
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .x_desc(x)
        .x_labels(4 * ticks.len())
        .x_label_formatter(&x_label)
        .y_desc("IOPS")
        .y_label_formatter(&y_label)
        .draw()
        .map_err(|e| failed(&e))?;
    for (n, line) in series.iter().enumerate() {
        let color = Palette99::pick(n).to_rgba();
        let points: Vec<(f64, f64)> =
            line.points.iter().map(|(x, y)| (place(*x), height(*y))).collect();
        let dots = points.iter().map(|point| Circle::new(*point, 3, color.filled()));
        chart.draw_series(dots).map_err(|e| failed(&e))?;
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))
            .map_err(|e| failed(&e))?
            .label(line.name.clone())
            .legend(move |(x, y)| Rectangle::new([(x, y - 3), (x + 12, y + 3)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}

/// In thousands or millions.
fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let (number, unit) = if value >= 1e6 { (value / 1e6, "M") } else { (value / 1e3, "k") };
    let digits = usize::from(number.fract() != 0.0 && number < 10.0);
    format!("{number:.digits$} {unit}")
}
