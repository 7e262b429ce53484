//! Registries that want what is not theirs: an image that is here, a login, what another image needs.

use std::process::Output;

use matchlock_test_support::Installation;
use matchlock_test_support::registry::{FakeRegistry, Fault, MANIFEST, digest_of};

use super::{
    assert_nothing_of_images_left, content, filled, layer, pull, pulled, refusal, stderr, stdout,
};

fn described(digest: &str, size: usize) -> String {
    format!(r#"{{"digest":"{digest}","size":{size}}}"#)
}

/// Puts an image there whose config lists the diff ids of these layers and whose manifest lists
/// what it is told to.
fn claim(registry: &FakeRegistry, repository: &str, layers: &[Vec<u8>], listed: &[String]) {
    let ids: Vec<String> = layers.iter().map(|layer| format!("{:?}", digest_of(layer))).collect();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/steal"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        ids.join(",")
    );
    let size = config.len();
    let config = described(&registry.blob(repository, config.into_bytes()), size);
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{config},"layers":[{}]}}"#,
        listed.join(",")
    );
    registry.manifest(repository, "1", MANIFEST, &text);
}

#[test]
fn a_root_filesystem_is_not_given_to_an_image_that_only_claims_its_layers() {
    let (registry, digests) = filled();
    let layers = [layer("one", 700_000), layer("two", 900_000)];
    let (host, installation) = (registry.host(), Installation::bare().unwrap());
    pulled(&pull(&installation, &host, "a:1"));
    // Layers that do not exist, and ones that do and are others.
    let none = ["a", "b"].map(|digit| described(&format!("sha256:{}", digit.repeat(64)), 5));
    claim(&registry, "steal", &layers, &none);
    let said = refusal(&pull(&installation, &host, "steal:1"));
    assert!(said.contains("no such image"), "{said}");
    let others = [layer("three", 10), layer("four", 10)];
    let others = others.map(|layer| {
        let size = layer.len();
        described(&registry.blob("other", layer), size)
    });
    claim(&registry, "other", &layers, &others);
    let said = refusal(&pull(&installation, &host, "other:1"));
    assert!(said.contains("layer 1 of 2 has the digest"), "{said}");
    let listed = stdout(&installation.output(&["image", "ls"]).unwrap());
    assert!(!listed.contains("steal") && !listed.contains("other"), "{listed}");
    // The very layers are known, and not asked for again.
    let own: Vec<_> = digests.iter().zip(&layers).map(|(d, l)| described(d, l.len())).collect();
    claim(&registry, "own", &layers, &own);
    pulled(&pull(&installation, &host, "own:1"));
    for digest in &digests {
        assert_eq!(registry.count(&format!("/own/blobs/{digest}")), 0);
    }
    for name in ["a:1", "own:1"] {
        let name = registry.name(name);
        pulled(&installation.output(&["image", "rm", &name]).unwrap());
    }
    assert_nothing_of_images_left(&installation);
}

#[test]
fn layers_of_which_nothing_is_known_are_verified_again_and_then_known() {
    let (registry, digests) = filled();
    let (host, installation) = (registry.host(), Installation::bare().unwrap());
    pulled(&pull(&installation, &host, "a:1"));
    let notes = || {
        let is_note = |path: &std::path::PathBuf| path.to_string_lossy().contains("/diff_");
        content(&installation).into_iter().filter(is_note).collect::<Vec<_>>()
    };
    assert_eq!(notes().len(), 2);
    // One is gone, as of images of an older version; the other was cut off.
    std::fs::remove_file(&notes()[0]).unwrap();
    std::fs::write(&notes()[0], "7").unwrap();
    let again = pull(&installation, &host, "a:1");
    pulled(&again);
    assert!(stdout(&again).contains("Up to date"), "{}", stdout(&again));
    assert_eq!(notes().len(), 2);
    for digest in digests {
        assert_eq!(registry.count(&digest), 1, "what is here is not downloaded");
    }
}

/// A pull with a login for this registry; an identity token if it is one.
fn with_login(installation: &Installation, registry: &FakeRegistry, login: &str) -> Output {
    std::fs::create_dir_all(installation.home()).unwrap();
    let text = format!(r#"{{"auths":{{"{}":{login}}}}}"#, registry.host());
    std::fs::write(installation.home().join("config.json"), text).unwrap();
    let (host, name) = (registry.host(), registry.name("a:1"));
    let command = installation.command(&["-q", "pull", "--insecure-registry", &host, &name]);
    command.unwrap().env("DOCKER_CONFIG", installation.home()).output().unwrap()
}

fn led_to(url: String) -> Fault {
    Fault::Status(307, vec![("Location", url)], "")
}

fn wants_token(realm: &FakeRegistry, path: &str) -> Fault {
    let challenge = format!("Bearer realm=\"http://{}{path}\",service=\"s\"", realm.host());
    Fault::Status(401, vec![("WWW-Authenticate", challenge)], "")
}

#[test]
fn a_host_that_a_registry_leads_to_gets_no_login_and_names_no_realm() {
    let (registry, layers) = filled();
    let (store, evil) = (FakeRegistry::new().unwrap(), FakeRegistry::new().unwrap());
    registry.misbehave(&layers[0], [led_to(format!("http://{}/blob?signed=secret", store.host()))]);
    store.misbehave("/blob", [wants_token(&evil, "/evil")]);
    let installation = Installation::bare().unwrap();
    let said = refusal(&with_login(&installation, &registry, r#"{"auth":"dTpw"}"#));
    assert!(said.contains("127.0.0.1 answered 401") && said.contains("leads there"), "{said}");
    assert!(evil.asked().is_empty(), "{:?}", evil.asked());
    let asked = store.asked();
    assert!(asked.iter().all(|asked| asked.authorization.is_none()), "{asked:?}");
    assert!(!asked.is_empty() && asked.iter().all(|asked| asked.referer.is_none()), "{asked:?}");
}

#[test]
fn a_realm_takes_a_login_to_no_other_host() {
    for login in [r#"{"identitytoken":"IDSECRET"}"#, r#"{"auth":"dTpw"}"#] {
        let (registry, _) = filled();
        let (realm, evil) = (FakeRegistry::new().unwrap(), FakeRegistry::new().unwrap());
        registry.misbehave("/manifests/", [wants_token(&realm, "/token")]);
        realm.misbehave("/token", [led_to(format!("http://{}/evil", evil.host()))]);
        let installation = Installation::bare().unwrap();
        let said = refusal(&with_login(&installation, &registry, login));
        assert!(said.contains("leads to another host") && !said.contains("SECRET"), "{said}");
        assert_eq!((realm.asked().len(), evil.asked()), (1, Vec::new()));
        // Within itself it may.
        let (registry, _) = filled();
        registry.misbehave("/manifests/", [wants_token(&realm, "/token")]);
        realm.misbehave("/token", [led_to(format!("http://{}/there", realm.host()))]);
        realm.misbehave("/there", [Fault::Status(200, Vec::new(), r#"{"token":"t"}"#)]);
        let output = with_login(&Installation::bare().unwrap(), &registry, login);
        pulled(&output);
        let there = realm.asked().pop().unwrap();
        assert_eq!(there.body.contains("IDSECRET"), login.contains("IDSECRET"), "{there:?}");
        assert!(!stderr(&output).contains("SECRET"));
    }
}

#[test]
fn an_image_that_lies_about_a_layer_takes_it_from_no_other_image() {
    let (registry, digests) = filled();
    let layers = [layer("one", 700_000), layer("two", 900_000)];
    let (host, installation) = (registry.host(), Installation::bare().unwrap());
    pulled(&pull(&installation, &host, "a:1"));
    let before = content(&installation);
    // Another size, or another content than the config says.
    let sizes = [600, layers[1].len()];
    let lies: Vec<_> = digests.iter().zip(sizes).map(|(d, size)| described(d, size)).collect();
    claim(&registry, "size", &layers, &lies);
    let said = refusal(&pull(&installation, &host, "size:1"));
    assert!(said.contains("has 600 bytes"), "{said}");
    let swapped: Vec<String> =
        digests.iter().zip(&layers).map(|(d, l)| described(d, l.len())).collect();
    let swapped: Vec<_> = swapped.into_iter().rev().collect();
    claim(&registry, "order", &layers, &swapped);
    let said = refusal(&pull(&installation, &host, "order:1"));
    assert!(said.contains("layer 1 of 2 has the digest"), "{said}");
    let after = content(&installation);
    assert!(before.iter().all(|path| after.contains(path)), "{before:?} {after:?}");
    pulled(&pull(&installation, &host, "a:1"));
    assert_eq!(registry.count("/a/blobs/"), 3, "nothing was downloaded again");
}
