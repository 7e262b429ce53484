//! Who may import whom (docs/ARCHITECTURE.md), checked from `cargo metadata` and the sources.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Our crates, and which of ours each may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "matchlock",
        &[
            "matchlock-actors",
            "matchlock-failpoints",
            "matchlock-host",
            "matchlock-model",
            "matchlock-store",
        ],
    ),
    (
        "matchlock-actors",
        &["matchlock-failpoints", "matchlock-host", "matchlock-model", "matchlock-store"],
    ),
    ("matchlock-failpoints", &[]),
    ("matchlock-host", &["matchlock-failpoints", "matchlock-model", "matchlock-wire"]),
    ("matchlock-store", &["matchlock-failpoints", "matchlock-model"]),
    ("matchlock-model", &[]),
    ("matchlock-wire", &[]),
    ("matchlock-guest", &["matchlock-wire"]),
    ("matchlock-test-support", &[]),
];

/// Crates from outside that only some of ours may use.
const RESERVED: &[(&str, &[&str])] = &[
    ("rusqlite", &["matchlock-store"]),
    ("deadpool-sqlite", &["matchlock-store"]),
    ("rtnetlink", &["matchlock-host"]),
    ("rustables", &["matchlock-host"]),
    ("nix", &["matchlock-host", "matchlock-guest"]),
    ("libc", &["matchlock-host", "matchlock-guest"]),
    ("yamux", &["matchlock-host", "matchlock-guest"]),
    ("ractor", &["matchlock", "matchlock-actors"]),
    ("clap", &["matchlock"]),
    ("fail", &["matchlock-failpoints"]),
];

/// What must not stand in the sources of a folder, and why.
const BANNED: &[(&str, &[&str], &str)] = &[
    (
        "model/src",
        &[
            "std::fs",
            "std::net::Tcp",
            "std::process",
            "std::thread",
            "tokio",
            "SystemTime",
            "Instant::now",
            "Timestamp::now",
            "getrandom",
            "async fn",
        ],
        "the model is pure",
    ),
    (
        "actors/src",
        &[
            "std::fs",
            "std::process",
            "println!",
            "eprintln!",
            "rusqlite",
            "SELECT ",
            "INSERT ",
            "LinuxRootfs",
            "LinuxSnapshots",
            "LinuxProcesses",
            "LinuxOwnerLocks",
            "LinuxTaps",
            "LinuxFirewall",
            "LinuxNetworkLocks",
            "YamuxConnector",
            "Qemu",
        ],
        "actors make no system calls, hold no SQL, print nothing and name no implementation",
    ),
    ("host/src", &["matchlock_store", "matchlock_actors", "rusqlite"], "host knows no rows"),
    ("store/src", &["matchlock_host", "matchlock_actors", "tokio::spawn"], "store knows no host"),
    ("wire/src", &["matchlock_model", "std::fs"], "wire knows nothing of the model"),
    (
        "src/cli",
        &[
            "LinuxRootfs",
            "LinuxSnapshots",
            "LinuxProcesses",
            "LinuxOwnerLocks",
            "LinuxTaps",
            "LinuxFirewall",
            "LinuxNetworkLocks",
            "YamuxConnector",
            "Qemu::",
        ],
        "only src/node/wiring.rs names implementations",
    ),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn dependencies() -> BTreeMap<String, Vec<(String, DependencyKind)>> {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .other_options(vec!["--offline".to_owned()])
        .exec()
        .unwrap();
    let of = |package: &cargo_metadata::Package| {
        package.dependencies.iter().map(|d| (d.name.clone(), d.kind)).collect()
    };
    metadata.packages.iter().map(|p| (p.name.to_string(), of(p))).collect()
}

fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

#[test]
fn our_crates_depend_only_as_the_architecture_says() {
    let dependencies = dependencies();
    let known: Vec<&str> = ALLOWED.iter().map(|(name, _)| *name).collect();
    for (name, its) in &dependencies {
        let allowed = ALLOWED.iter().find(|(known, _)| known == name);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{name} is not in the architecture"));
        for (dependency, kind) in its {
            if *kind == DependencyKind::Normal && known.contains(&dependency.as_str()) {
                assert!(allowed.contains(&dependency.as_str()), "{name} imports {dependency}");
            }
        }
    }
    assert_eq!(dependencies.len(), ALLOWED.len());
}

#[test]
fn outside_crates_stay_where_they_belong() {
    for (name, its) in dependencies() {
        for (dependency, kind) in its {
            let Some((_, users)) = RESERVED.iter().find(|(crate_, _)| *crate_ == dependency) else {
                continue;
            };
            if kind == DependencyKind::Normal {
                assert!(users.contains(&name.as_str()), "{name} uses {dependency}");
            }
        }
    }
}

#[test]
fn banned_words_stay_out_of_the_sources() {
    for (dir, words, why) in BANNED {
        for (path, text) in sources(&root().join(dir)) {
            let is_test =
                path.components().any(|c| c.as_os_str() == "tests" || c.as_os_str() == "tests.rs");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for (number, line) in code.lines().enumerate() {
                let line = line.trim_start();
                if is_test || line.starts_with("//") {
                    continue;
                }
                for word in *words {
                    assert!(
                        !line.contains(word),
                        "{}:{}: {word:?}: {why}",
                        path.display(),
                        number + 1
                    );
                }
            }
        }
    }
}

#[test]
fn only_the_command_line_prints() {
    for dir in ["actors/src", "host/src", "model/src", "store/src", "wire/src", "src/node"] {
        for (path, text) in sources(&root().join(dir)) {
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for word in ["println!(", "print!(", "eprint!(", "dbg!("] {
                let printed =
                    code.lines().any(|l| l.contains(word) && !l.trim_start().starts_with("//"));
                assert!(!printed, "{} prints with {word}", path.display());
            }
        }
    }
}

#[test]
fn files_stay_readable() {
    for dir in [
        "src",
        "actors/src",
        "failpoints/src",
        "host/src",
        "model/src",
        "store/src",
        "wire/src",
        "guest/src",
        "tests",
    ] {
        for (path, text) in sources(&root().join(dir)) {
            let lines = text.lines().count();
            assert!(lines <= 600, "{} has {lines} lines: split it", path.display());
        }
    }
}

#[test]
fn every_profile_unwinds_but_the_guests() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let aborts = manifest.matches("panic = \"abort\"").count();
    assert_eq!(aborts, 1, "only [profile.guest] may abort on panic");
    assert!(manifest.split("[profile.guest]").nth(1).unwrap().contains("panic = \"abort\""));
}
