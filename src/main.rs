//! The `matchlock` command: parse, run, print the error, exit with the code. Nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    matchlock::cli::main()
}
