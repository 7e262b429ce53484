//! Images from registries: Debian's `docker-registry`, filled by `skopeo`, and one of our own that
//! misbehaves. All on loopback. Needs root and the environment of `make test`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod docker;
mod full;
mod hostile;
mod interrupted;
mod leaks;
mod real;
mod session;
mod together;

use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use matchlock_test_support::Installation;
use matchlock_test_support::registry::FakeRegistry;

/// How long something may take on a loaded machine before a test gives up. Not a measure of speed.
const PATIENCE: Duration = Duration::from_secs(180);

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `pull` of an image of a registry that is asked by plain HTTP, without progress.
fn pull(installation: &Installation, host: &str, image: &str) -> Output {
    let name = format!("{host}/{image}");
    installation.output(&["-q", "pull", "--insecure-registry", host, &name]).unwrap()
}

/// The one line of a failed pull.
fn refusal(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = stderr(output);
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn pulled(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
}

/// A layer with one file of this name and so many bytes.
fn layer(name: &str, size: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    // Not compressible into nothing, and the same each time.
    let content: Vec<u8> =
        (0..size).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[1]).collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, &*content).unwrap();
    builder.into_inner().unwrap()
}

/// A registry with the image `a:1` of two layers; the digests of the layers.
fn filled() -> (FakeRegistry, Vec<String>) {
    let registry = FakeRegistry::new().unwrap();
    let layers = [layer("one", 700_000), layer("two", 900_000)];
    let (_, digests) = registry.image("a", "1", "amd64", &layers);
    (registry, digests)
}

/// The files of a directory and all below it.
fn files(dir: PathBuf) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { dirs.push(path) } else { found.push(path) }
        }
    }
    found
}

/// What is downloaded in an installation's cache.
fn content(installation: &Installation) -> Vec<PathBuf> {
    files(installation.cache().join("images/content"))
}

/// After `gc` nothing of an image is left that has no row.
fn assert_nothing_of_images_left(installation: &Installation) {
    let swept = installation.output(&["gc"]).unwrap();
    assert_eq!(swept.status.code(), Some(0), "{}", stderr(&swept));
    for dir in ["content", "blobs", "tmp"] {
        let left = files(installation.cache().join("images").join(dir));
        assert!(left.is_empty(), "{left:?}");
    }
    assert_no_vm_left(installation);
}

/// The VMs here have no network: links are those of other tests.
fn assert_no_vm_left(installation: &Installation) {
    let mut remains = installation.remains().unwrap();
    remains.links.clear();
    assert!(remains.is_empty(), "{remains:?}");
}
