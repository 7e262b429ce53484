//! Many processes that want the same image at once.

use std::process::Stdio;

use matchlock_test_support::{Installation, Running};

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
