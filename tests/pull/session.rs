//! Sessions pull what is not here.

use std::process::Stdio;

use matchlock_test_support::registry::{FakeRegistry, Fault};
use matchlock_test_support::{Installation, Session, busybox_archive, small_vm};

use super::docker::{DockerRegistry, Door};
use super::{PATIENCE, assert_no_vm_left, assert_nothing_of_images_left, filled};

fn session(installation: &Installation, insecure: &str) -> Session {
    std::fs::create_dir_all(installation.home()).unwrap();
    let config = format!("[registry]\ninsecure = [{insecure:?}]\n");
    std::fs::write(installation.home().join("config.toml"), config).unwrap();
    let mut command = installation.command(&["rpc"]).unwrap();
    Session::start(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap()
}

#[test]
fn create_pulls_an_image_that_is_not_here() {
    let registry = DockerRegistry::start(Door::Http);
    let archive = format!("docker-archive:{}", busybox_archive().unwrap().display());
    registry.push(&archive, "busybox:1", &[]);
    let installation = Installation::without_images().unwrap();
    let mut session = session(&installation, registry.host());
    let mut wanted = small_vm();
    wanted["image"] = format!("{}/busybox:1", registry.host()).into();
    for _ in 0..2 {
        session.call("create", &wanted).unwrap();
    }
    assert_eq!(registry.blobs_sent(), 2, "config and layer, once");
    session.close_input();
    session.wait(PATIENCE).unwrap();
    assert_no_vm_left(&installation);
}

#[test]
fn a_create_that_pulls_is_cancelled_and_the_session_goes_on() {
    let (registry, layers): (FakeRegistry, _) = filled();
    registry.misbehave(&layers[1], [Fault::Hold]);
    let installation = Installation::without_images().unwrap();
    let mut session = session(&installation, &registry.host());
    let mut wanted = small_vm();
    wanted["image"] = registry.name("a:1").into();
    let id = session.send("create", &wanted).unwrap();
    registry.wait_for(&layers[1], PATIENCE).unwrap();
    session.call("cancel", &serde_json::json!({ "id": id })).unwrap();
    session.answer(id).unwrap().unwrap_err();
    wanted["image"] = registry.name("nothing").into();
    let (_, said) = session.ask("create", &wanted).unwrap().unwrap_err();
    assert!(said.contains("no such image"), "{said}");
    session.close_input();
    session.wait(PATIENCE).unwrap();
    assert_nothing_of_images_left(&installation);
}
