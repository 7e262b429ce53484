//! The quick suites, in one program. A file of theirs that is not named here fails a test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod layering;

#[path = "cli/diagnose.rs"]
mod cli_diagnose;
#[path = "cli/errors.rs"]
mod cli_errors;
#[path = "cli/gc.rs"]
mod cli_gc;
#[path = "cli/guest.rs"]
mod cli_guest;
#[path = "cli/help.rs"]
mod cli_help;
#[path = "cli/image_verbs.rs"]
mod cli_image_verbs;
#[path = "cli/images.rs"]
mod cli_images;
#[path = "cli/progress.rs"]
mod cli_progress;
#[path = "cli/state.rs"]
mod cli_state;
#[path = "cli/upgrade.rs"]
mod cli_upgrade;

/// How long a program without a VM may take on a loaded machine before a test gives up.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

/// A test file that nobody includes would never run.
#[test]
fn no_test_file_is_forgotten() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let this = std::fs::read_to_string(root.join("runner.rs")).unwrap();
    let vm = std::fs::read_to_string(root.join("vm/main.rs")).unwrap();
    let crash = std::fs::read_to_string(root.join("crash/main.rs")).unwrap();
    let rpc = std::fs::read_to_string(root.join("rpc/main.rs")).unwrap();
    for (dir, includer) in [("cli", &this), ("vm", &vm), ("crash", &crash), ("rpc", &rpc)] {
        for entry in std::fs::read_dir(root.join(dir)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let Some(stem) = name.strip_suffix(".rs").filter(|stem| *stem != "main") else {
                continue;
            };
            let named = includer.contains(&format!("{dir}/{name}"))
                || includer.contains(&format!("mod {stem};"));
            assert!(named, "tests/{dir}/{name} is not included by its runner");
        }
    }
}
