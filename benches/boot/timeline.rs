//! The picture of a `run`: what it does when, one line per step.

use std::fmt::{self, Write as _};

use crate::life::Life;

const WIDTH: f64 = 900.0;
const LABELS: f64 = 150.0;
const NUMBERS: f64 = 70.0;
const LINE: f64 = 18.0;
const TITLE: f64 = 34.0;
/// What is shorter is not drawn on a line of its own.
const LEAST_MS: f64 = 0.5;

/// One panel for each life, all on the scale of the longest.
pub(crate) fn svg(lives: &[(String, &Life)]) -> Result<String, fmt::Error> {
    let longest = lives.iter().map(|(_, life)| life.whole).fold(1.0, f64::max);
    let scale = (WIDTH - LABELS - NUMBERS) / longest;
    let mut body = String::new();
    let mut top = 8.0;
    for (start, life) in lives {
        top = panel(&mut body, top, scale, start, life)?;
    }
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    ))
}

fn panel(
    body: &mut String,
    top: f64,
    scale: f64,
    start: &str,
    life: &Life,
) -> Result<f64, fmt::Error> {
    writeln!(
        body,
        "<text x=\"8\" y=\"{:.0}\" font-weight=\"bold\">matchlock run … true, {start}: {:.0} ms</text>",
        top + 16.0,
        life.whole
    )?;
    let mut y = top + TITLE;
    let shown = life.effects.iter().filter(|span| span.end - span.begin >= LEAST_MS);
    for span in shown {
        let took = span.end - span.begin;
        let (x, width) = (LABELS + span.begin * scale, (took * scale).max(1.0));
        let color = match span.name.as_str() {
            "connect_guest" => "#4878a8",
            "configure_guest" | "the command" => "#58a058",
            _ => "#c07840",
        };
        writeln!(
            body,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{x:.1}\" y=\"{:.0}\" width=\"{width:.1}\" height=\"12\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{:.0}\" fill=\"#555\">{took:.1} ms</text>",
            LABELS - 8.0,
            y + 10.0,
            span.name,
            y,
            x + width + 4.0,
            y + 10.0,
        )?;
        y += LINE;
    }
    writeln!(
        body,
        "<path d=\"M{LABELS} {:.0} V{y:.0} H{:.1} V{:.0}\" fill=\"none\" stroke=\"#999\"/>",
        top + TITLE - 6.0,
        LABELS + life.whole * scale,
        top + TITLE - 6.0,
    )?;
    Ok(y + 14.0)
}
