//! Tables for people: aligned, as wide as the terminal, coloured where somebody looks.
//!
//! # Invariants
//! 1. Where stdout is no terminal nothing is cut and nothing is coloured: a script gets what there is.
//! 2. Colours are off with `NO_COLOR` (whatever it says) and on a dumb terminal.
//! 3. A cell is one line of printable characters, whatever is stored.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _};

use anstyle::{AnsiColor, Style};
use terminal_size::{Width, terminal_size};

use super::error::CliError;
use super::render;

/// Between two columns.
const GAP: usize = 2;

/// What a cut cell ends with.
const CUT: char = '…';

/// A column.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    title: &'static str,
    /// The width to which it may shrink; `None` for one that does not.
    least: Option<usize>,
}

impl Column {
    /// A column that is always shown whole.
    pub(super) const fn whole(title: &'static str) -> Self {
        Self { title, least: None }
    }

    /// A column that is cut on a narrow terminal.
    pub(super) const fn cut(title: &'static str, least: usize) -> Self {
        Self { title, least: Some(least) }
    }
}

/// A cell.
#[derive(Debug, Clone)]
pub(super) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// A text in a colour.
    pub(super) fn coloured(text: impl Into<String>, colour: Option<AnsiColor>) -> Self {
        let text = printable(&text.into()).into_owned();
        Self { text, style: Style::new().fg_color(colour.map(Into::into)) }
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::coloured(text, None)
    }
}

fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) {
        text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
    } else {
        text.into()
    }
}

/// Where a table is printed.
#[derive(Debug, Clone, Copy)]
struct Screen {
    width: Option<usize>,
    colours: bool,
}

impl Screen {
    fn of_stdout() -> Self {
        if !io::stdout().is_terminal() {
            return Self { width: None, colours: false };
        }
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        // A terminal that does not know its width says 0.
        let width = terminal_size().map(|(Width(width), _)| usize::from(width));
        Self { width: width.filter(|width| *width > 0), colours: !is_set("NO_COLOR") && !is_dumb }
    }
}

/// Prints a table.
pub(super) fn print(columns: &[Column], rows: &[Vec<Cell>]) -> Result<(), CliError> {
    render::lines(lines(Screen::of_stdout(), columns, rows))
}

fn lines(screen: Screen, columns: &[Column], rows: &[Vec<Cell>]) -> Vec<String> {
    let widths = widths(screen, columns, rows);
    let header = columns.iter().map(|column| Cell::coloured(column.title, None)).collect();
    let line = |cells: &Vec<Cell>| {
        let mut line = String::new();
        for (place, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let text = fitted(&cell.text, *width);
            // The last cell is not filled up: no line ends with spaces.
            let fill = if place + 1 == cells.len() { 0 } else { width + GAP - length(&text) };
            if screen.colours {
                line.push_str(&format!("{}{text}{:#}", cell.style, cell.style));
            } else {
                line.push_str(&text);
            }
            line.extend(std::iter::repeat_n(' ', fill));
        }
        line
    };
    std::iter::once(&header).chain(rows).map(line).collect()
}

fn length(text: &str) -> usize {
    text.chars().count()
}

fn fitted(text: &str, width: usize) -> Cow<'_, str> {
    if length(text) <= width {
        return text.into();
    }
    text.chars().take(width.saturating_sub(1)).chain([CUT]).collect()
}

/// As wide as the widest cell; what is too much for the screen is taken from the columns that may be
/// cut, in their order.
fn widths(screen: Screen, columns: &[Column], rows: &[Vec<Cell>]) -> Vec<usize> {
    let mut widths: Vec<usize> = columns.iter().map(|column| length(column.title)).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(length(&cell.text));
        }
    }
    let gaps = GAP * columns.len().saturating_sub(1);
    let Some(screen) = screen.width else { return widths };
    let mut too_much = (widths.iter().sum::<usize>() + gaps).saturating_sub(screen);
    for (width, column) in widths.iter_mut().zip(columns) {
        let Some(least) = column.least else { continue };
        let taken = too_much.min(width.saturating_sub(least.max(length(column.title))));
        *width -= taken;
        too_much -= taken;
    }
    widths
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column] =
        &[Column::whole("ID"), Column::cut("IMAGE", 5), Column::whole("PID")];

    fn rows() -> Vec<Vec<Cell>> {
        let row = |id: &str, image: &str, pid: &str| {
            let id = Cell::coloured(id, Some(AnsiColor::Green));
            vec![id, image.to_owned().into(), pid.to_owned().into()]
        };
        vec![row("vm-1", "registry.example/a/long:tag", "-"), row("vm-2", "b\x1b[2J\nc", "12")]
    }

    fn shown(width: Option<usize>, colours: bool) -> Vec<String> {
        lines(Screen { width, colours }, COLUMNS, &rows())
    }

    #[test]
    fn what_is_no_terminal_gets_everything() {
        assert_eq!(
            shown(None, false),
            [
                "ID    IMAGE                        PID",
                "vm-1  registry.example/a/long:tag  -",
                "vm-2  b?[2J?c                      12",
            ]
        );
        assert_eq!(shown(Some(38), false), shown(None, false), "it fits");
    }

    #[test]
    fn a_narrow_terminal_cuts_what_may_be_cut_and_no_more() {
        let narrow = shown(Some(25), false);
        assert_eq!(narrow[1], "vm-1  registry.exam…  -");
        assert!(narrow.iter().all(|line| length(line) <= 25), "{narrow:?}");
        // Too narrow for all of it: the rest stays readable.
        for width in 1..17 {
            assert_eq!(shown(Some(width), false)[1], "vm-1  regi…  -", "{width}");
        }
    }

    #[test]
    fn colours_do_not_count_as_width() {
        let coloured = shown(Some(25), true);
        let plain = shown(Some(25), false);
        assert_eq!(coloured[1], "\u{1b}[32mvm-1\u{1b}[0m  registry.exam…  -");
        assert_eq!(coloured[0], plain[0]);
    }
}
