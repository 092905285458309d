//! Plots, as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

/// Size of one panel, in pixels.
const PANEL: (u32, u32) = (420, 340);
/// Space that a bar leaves on each side, as a share of its slot.
const GAP: f64 = 0.15;

/// A panel of labelled bars.
pub(crate) struct Bars {
    /// What is shown, with its unit.
    pub(crate) title: &'static str,
    /// A bar each.
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
