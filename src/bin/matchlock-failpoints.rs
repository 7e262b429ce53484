//! The `matchlock` command with failpoints, for the crash suite; see `failpoints/src/lib.rs`.
//! `matchlock-failpoints __failpoints` lists them.

use std::io::Write as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().skip(1).eq(["__failpoints"]) {
        let listed = matchlock::points::all().join("\n") + "\n";
        return match std::io::stdout().write_all(listed.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let _armed = matchlock_failpoints::arm();
    matchlock::cli::main()
}
