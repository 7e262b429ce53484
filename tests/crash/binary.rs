//! The program that everybody gets has no failpoints.

use matchlock_test_support::Installation;

/// What only the program with failpoints has in it.
const TRACES: &[&str] = &[
    "MATCHLOCK_FAILPOINTS_LOG",
    "MATCHLOCK_MUTATION",
    "FAILPOINTS",
    "injected at",
    "__failpoints",
];

fn holds(program: &str, text: &str) -> bool {
    let bytes = std::fs::read(program).unwrap();
    bytes.windows(text.len()).any(|part| part == text.as_bytes())
}

#[test]
fn the_ordinary_program_has_no_failpoints() {
    let ordinary = matchlock_test_support::program().unwrap();
    let ordinary = ordinary.to_str().unwrap();
    for trace in TRACES {
        assert!(!holds(ordinary, trace), "{ordinary} has {trace:?} in it");
        assert!(
            holds(&super::case::program(), trace),
            "the suite looks for the wrong text: {trace}"
        );
    }
    let installation = Installation::bare().unwrap();
    let refused = installation.output(&["__failpoints"]).unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let armed = "home.open_state.before=return(kill);home.open_state.before=panic";
    let gc = installation.command(&["gc"]).unwrap().env("FAILPOINTS", armed).output().unwrap();
    assert_eq!(gc.status.code(), Some(0), "{gc:?}");
}
