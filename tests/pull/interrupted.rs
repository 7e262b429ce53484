//! Pulls that do not come to their end.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;

use matchlock_test_support::registry::Fault;
use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::Signal;

use super::{PATIENCE, assert_nothing_of_images_left, content, filled, pull, pulled, stderr};

/// A pull whose second layer stops halfway, once the first is there and the second has begun.
fn stopped(
    installation: &Installation,
) -> (matchlock_test_support::registry::FakeRegistry, Vec<String>, Running) {
    let (registry, layers) = filled();
    registry.misbehave(&layers[1], [Fault::Hold]);
    let (host, name) = (registry.host(), registry.name("a:1"));
    let mut command =
        installation.command(&["-q", "pull", "--insecure-registry", &host, &name]).unwrap();
    let pulling = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped())).unwrap();
    let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
    let (whole, begun) = (hex(&layers[0]), hex(&layers[1]));
    wait_until(PATIENCE, "one layer and the beginning of the other", || {
        let content = content(installation);
        let is_there = |what: &str| {
            content.iter().any(|path| {
                path.to_string_lossy().ends_with(what)
                    && path.metadata().is_ok_and(|found| found.len() > 0)
            })
        };
        Ok(is_there(&format!("content/sha256_{whole}"))
            && is_there(&format!("partial/sha256_{begun}")))
    })
    .unwrap();
    (registry, layers, pulling)
}

#[test]
fn a_killed_pull_is_taken_up_where_it_ended() {
    let installation = Installation::bare().unwrap();
    let (registry, layers, pulling) = stopped(&installation);
    pulling.signal(Signal::KILL).unwrap();
    assert_eq!(pulling.wait(PATIENCE).unwrap().status.signal(), Some(9));
    pulled(&pull(&installation, &registry.host(), "a:1"));
    assert_eq!(registry.count(&layers[0]), 1, "what was there is not asked for again");
    let ranges: Vec<_> = registry
        .asked()
        .into_iter()
        .filter(|asked| asked.path.contains(&layers[1]))
        .map(|asked| asked.range.is_some())
        .collect();
    assert_eq!(ranges, [false, true]);
}

#[test]
fn gc_removes_what_a_killed_pull_has_left() {
    let installation = Installation::bare().unwrap();
    let (_registry, _, pulling) = stopped(&installation);
    // While it lives, nothing of it goes.
    let before = content(&installation).len();
    pulled(&installation.output(&["gc"]).unwrap());
    assert_eq!(content(&installation).len(), before);
    pulling.signal(Signal::KILL).unwrap();
    pulling.wait(PATIENCE).unwrap();
    assert!(!content(&installation).is_empty());
    assert_nothing_of_images_left(&installation);
}

#[test]
fn a_signal_ends_a_pull_and_leaves_nothing_half_made() {
    let installation = Installation::bare().unwrap();
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let (registry, _, pulling) = stopped(&installation);
        pulling.signal(signal).unwrap();
        let output = pulling.wait(PATIENCE).unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert_eq!(stderr(&output), "");
        drop(registry);
        assert_nothing_of_images_left(&installation);
    }
}
