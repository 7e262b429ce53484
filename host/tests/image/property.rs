//! Random layers: hostile ones change nothing outside, honest ones become what a model says.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tar::EntryType;

use crate::archives::{Entry, Image, dir, entry, file, hard_link, symlink};
use crate::view::{self, Kind};
use crate::world::World;

fn any_path() -> impl Strategy<Value = String> {
    // Mostly names that lead somewhere, so that a run is not over with its first entry.
    let part = prop_oneof![
        60 => prop::sample::select(vec!["a", "b", "out", "up", "deep", "er", "file"]),
        12 => prop::sample::select(vec![".wh.a", ".wh.file", ".wh..wh..opq", ".", ""]),
        1 => Just(".."),
    ];
    prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"))
}

fn any_target(outside: String) -> impl Strategy<Value = String> {
    let climbing = format!("../../../../../../../..{outside}");
    prop_oneof![
        any_path(),
        any_path().prop_map(|path| format!("/{path}")),
        any_path().prop_map(|path| format!("../../../{path}")),
        Just("/".to_owned()),
        prop::sample::select(vec![outside.clone(), format!("{outside}/deep"), climbing]),
        any_path().prop_map(move |path| format!("{outside}/{path}")),
        Just("/proc/self/root/tmp".to_owned()),
    ]
}

fn any_entry(outside: String) -> impl Strategy<Value = Entry> {
    (any_path(), any_target(outside), 0..8).prop_map(|(path, target, kind)| match kind {
        0 | 1 => file(path, "written"),
        2 => dir(path).mode(0o700),
        3 | 4 => symlink(path, target),
        5 => hard_link(path, target),
        6 => entry(EntryType::Fifo, path),
        _ => file(target, "through"),
    })
}

#[test]
fn no_layer_changes_anything_outside() {
    let Some(world) = World::new() else { return };
    let outside = world.outside().to_str().unwrap().to_owned();
    // Ways out to begin with; that there are such directories inside keeps them from being refused.
    let prelude = [
        dir(format!("{outside}/deep/er")),
        symlink("out", &outside),
        symlink("a/out", format!("{outside}/deep")),
        symlink("up", format!("../../../../../../../..{outside}")),
    ];
    let layer = prop::collection::vec(any_entry(outside), 1..12);
    let layers = prop::collection::vec(layer, 1..3);
    let mut runner = proptest::test_runner::TestRunner::new(config(400));
    let accepted = std::cell::Cell::new(0);
    runner
        .run(&layers, |layers| {
            let layers = layers.iter().map(Vec::as_slice);
            let layers: Vec<&[Entry]> = std::iter::once(&prelude[..]).chain(layers).collect();
            // The world looks at its sentinels whatever comes of it.
            if world.import(&Image::of(&layers).saved()).is_ok() {
                accepted.set(accepted.get() + 1);
            }
            Ok(())
        })
        .unwrap();
    assert!(accepted.get() > 0, "none of the layers got as far as an image");
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Honest changes, as an overlay would record them.
#[derive(Debug, Clone)]
enum Change {
    File(Vec<&'static str>, u8),
    Directory(Vec<&'static str>),
    Whiteout(Vec<&'static str>),
    Opaque(Vec<&'static str>),
}

fn any_change() -> impl Strategy<Value = Change> {
    let part = prop::sample::select(vec!["a", "b", "c"]);
    let path = prop::collection::vec(part, 1..4);
    (path, 0..6, any::<u8>()).prop_map(|(path, kind, data)| match kind {
        0 | 1 => Change::File(path, data),
        2 | 3 => Change::Directory(path),
        4 => Change::Whiteout(path),
        _ => Change::Opaque(path),
    })
}

/// A tree of names: a file has content, a directory has none.
type Model = BTreeMap<String, Option<u8>>;

fn remove_below(model: &mut Model, path: &str) {
    let prefix = format!("{path}/");
    model.retain(|name, _| !name.starts_with(&prefix));
}

fn put(model: &mut Model, path: &[&str], content: Option<u8>) {
    for length in 1..path.len() {
        let parent = path[..length].join("/");
        model.insert(parent, None);
    }
    let name = path.join("/");
    if content.is_some() {
        remove_below(model, &name);
    }
    model.insert(name, content);
}

/// What a layer leaves of lower ones, and then what it adds: the order that the format means.
fn apply(model: &mut Model, layer: &[Change]) {
    for change in layer {
        match change {
            Change::Whiteout(path) => {
                let name = path.join("/");
                model.remove(&name);
                remove_below(model, &name);
            }
            Change::Opaque(path) => remove_below(model, &path.join("/")),
            Change::File(..) | Change::Directory(_) => {}
        }
    }
    for change in layer {
        match change {
            Change::File(path, data) => put(model, path, Some(*data)),
            Change::Directory(path) => put(model, path, None),
            Change::Whiteout(_) | Change::Opaque(_) => {}
        }
    }
}

fn written(change: &Change) -> Entry {
    match change {
        Change::File(path, data) => file(path.join("/"), [*data]),
        Change::Directory(path) => dir(path.join("/")),
        Change::Whiteout(path) => {
            let (last, parents) = path.split_last().unwrap();
            let name = format!(".wh.{last}");
            file([parents, &[name.as_str()]].concat().join("/"), "")
        }
        Change::Opaque(path) => file(format!("{}/.wh..wh..opq", path.join("/")), ""),
    }
}

#[test]
fn honest_layers_become_what_the_model_says() {
    let Some(world) = World::new() else { return };
    let layer = prop::collection::vec(any_change(), 1..10);
    let layers = prop::collection::vec(layer, 1..4);
    let mut runner = proptest::test_runner::TestRunner::new(config(150));
    runner
        .run(&layers, |layers| {
            let mut model = Model::new();
            for layer in &layers {
                apply(&mut model, layer);
            }
            let layers: Vec<Vec<Entry>> =
                layers.iter().map(|layer| layer.iter().map(written).collect()).collect();
            let layers: Vec<&[Entry]> = layers.iter().map(Vec::as_slice).collect();
            let image = world.import(&Image::of(&layers).saved()).unwrap();
            let view = view::erofs(&image.rootfs_path);
            let found: Model = view
                .into_iter()
                .filter(|(name, _)| !name.is_empty())
                .map(|(name, node)| match node.kind {
                    Kind::File(data) => (name, Some(data[0])),
                    Kind::Directory => (name, None),
                    other => panic!("{name}: {other:?}"),
                })
                .collect();
            prop_assert_eq!(found, model);
            Ok(())
        })
        .unwrap();
}
