//! Many processes that want the same image at once.

use std::process::Stdio;

use matchlock_test_support::registry::Fault;
use matchlock_test_support::{Installation, Running};
use rustix::process::Signal;

use super::{PATIENCE, content, files, filled, pulled};

#[test]
fn eight_pulls_at_once_download_each_blob_once_and_build_once() {
    let (registry, _) = filled();
    let installation = Installation::bare().unwrap();
    let (host, name) = (registry.host(), registry.name("a:1"));
    let start = |_| {
        let args = ["pull", "--insecure-registry", &host, &name];
        let mut command = installation.command(&args).unwrap();
        Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped())).unwrap()
    };
    let pulling: Vec<Running> = (0..8).map(start).collect();
    let outputs: Vec<_> =
        pulling.into_iter().map(|running| running.wait(PATIENCE).unwrap()).collect();
    let mut built = 0;
    for output in &outputs {
        pulled(output);
        built += String::from_utf8_lossy(&output.stderr).matches("building").count();
    }
    assert_eq!(built, 1, "{outputs:?}");
    let blobs: Vec<_> =
        registry.asked().into_iter().filter(|asked| asked.path.contains("/blobs/")).collect();
    let mut paths: Vec<_> = blobs.iter().map(|asked| &asked.path).collect();
    paths.sort();
    paths.dedup();
    assert_eq!((blobs.len(), paths.len()), (3, 3), "config and two layers: {blobs:?}");
    // Manifest, config, two layers and what is known of each; nothing half-made.
    assert_eq!(content(&installation).len(), 6, "{:?}", content(&installation));
    assert_eq!(files(installation.cache().join("images/blobs")).len(), 1);
    assert!(files(installation.cache().join("images/tmp")).is_empty());
}

#[test]
fn a_registry_that_drips_does_not_hold_up_a_pull_of_the_same_layer_from_another() {
    let ((dripping, layers), (honest, _)) = (filled(), filled());
    dripping.misbehave("/blobs/", std::iter::repeat_n(Fault::Drip, 9));
    let installation = Installation::bare().unwrap();
    let (host, name) = (dripping.host(), dripping.name("a:1"));
    let mut command =
        installation.command(&["-q", "pull", "--insecure-registry", &host, &name]).unwrap();
    let slow = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped())).unwrap();
    // The config is the first, and the same in both.
    dripping.wait_for("/blobs/", PATIENCE).unwrap();
    let (host, name) = (honest.host(), honest.name("a:1"));
    let output = installation.output(&["pull", "--insecure-registry", &host, &name]).unwrap();
    pulled(&output);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("another process downloads it and hardly gets on"), "{said}");
    assert_eq!(honest.count(&layers[0]), 1);
    slow.signal(Signal::KILL).unwrap();
    slow.wait(PATIENCE).unwrap();
    assert_eq!(files(installation.cache().join("images/blobs")).len(), 1);
}
