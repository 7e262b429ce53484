//! The table in docs/SPECIFICATION.md, made of what the soak has found.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::case::Fault;
use super::random::VICTIMS;
use super::soak::{Line, commit, lines};

const BEGIN: &str = "<!-- soak: written by `make soak-table` -->";
const END: &str = "<!-- soak: end -->";

/// What the cases of one cell come to.
#[derive(Debug, Default, Clone)]
struct Cell {
    played: usize,
    leaking: usize,
    worst_ms: u64,
}

impl Cell {
    fn add(&mut self, line: &Line) {
        self.played += 1;
        self.leaking += usize::from(!line.leaks.is_empty());
        self.worst_ms = self.worst_ms.max(line.recovery_ms);
    }

    fn shown(&self) -> String {
        if self.played == 0 {
            return "–".to_owned();
        }
        format!("{} of {}", self.leaking, self.played)
    }
}

/// The part of the program that a point is in.
fn area(point: &str) -> &str {
    point.split(['.', ' ']).next().unwrap_or(point)
}

fn table(lines: &[Line]) -> String {
    let mut cells: BTreeMap<(String, String), Cell> = BTreeMap::new();
    let mut rows: BTreeMap<String, Cell> = BTreeMap::new();
    // A fault that needs a hypervisor says nothing where there was none.
    let counts = |line: &&Line| line.hypervisor != Some(false) || !line.leaks.is_empty();
    for line in lines.iter().filter(counts) {
        let area = area(&line.point).to_owned();
        cells.entry((area.clone(), line.fault.clone())).or_default().add(line);
        rows.entry(area).or_default().add(line);
    }
    let random = rows.remove("random").unwrap_or_default();
    let mut text = format!("Commit {}. Cases with something left, of those played:\n\n", commit());
    text.push_str("| failpoints |");
    for fault in Fault::ALL {
        write!(text, " {} |", fault.name()).unwrap();
    }
    text.push_str(" worst recovery |\n|---|");
    text.push_str(&"---|".repeat(Fault::ALL.len() + 1));
    text.push('\n');
    for (area, sum) in &rows {
        write!(text, "| `{area}.*` |").unwrap();
        for fault in Fault::ALL {
            let cell = cells.get(&(area.clone(), fault.name().to_owned())).cloned();
            write!(text, " {} |", cell.unwrap_or_default().shown()).unwrap();
        }
        writeln!(text, " {} ms |", sum.worst_ms).unwrap();
    }
    text.push_str("\n| SIGKILL at a random instant | cases | worst recovery |\n|---|---|---|\n");
    for victim in VICTIMS {
        let key = ("random".to_owned(), format!("SIGKILL of {victim}"));
        let cell = cells.get(&key).cloned().unwrap_or_default();
        writeln!(text, "| {victim} | {} | {} ms |", cell.shown(), cell.worst_ms).unwrap();
    }
    writeln!(text, "| all | {} | {} ms |", random.shown(), random.worst_ms).unwrap();
    text
}

#[test]
#[ignore = "`make soak-table`"]
fn the_table_is_written() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/SPECIFICATION.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let lines = lines();
    assert!(!lines.is_empty(), "nothing was played of {}: `make soak` first", commit());
    fs::write(path, format!("{before}{BEGIN}\n\n{}\n{END}{after}", table(&lines))).unwrap();
}

#[test]
fn cells_count_leaks_and_leave_out_what_was_not_there() {
    let line = |point: &str, fault: Fault, leaks: &[&str], hypervisor| Line {
        point: point.to_owned(),
        fault: fault.name().to_owned(),
        leaks: leaks.iter().map(|leak| (*leak).to_owned()).collect(),
        hypervisor,
        recovery_ms: 7,
        commit: String::new(),
    };
    let mut cell = Cell::default();
    assert_eq!(cell.shown(), "–");
    cell.add(&line("vm.launch.before", Fault::Kill, &[], None));
    cell.add(&line("vm.launch.after", Fault::Kill, &["a TAP"], None));
    assert_eq!((cell.shown(), cell.worst_ms), ("1 of 2".to_owned(), 7));
    assert_eq!(area("vm.launch.before"), "vm");
    assert_eq!(area("random 7"), "random");
}
