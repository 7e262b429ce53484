//! Registries that fail, lie and refuse.

use matchlock_test_support::Installation;
use matchlock_test_support::registry::{FakeRegistry, Fault, INDEX, MANIFEST, digest_of};

use super::{
    assert_nothing_of_images_left, content, filled, layer, pull, pulled, refusal, stderr, stdout,
};

fn status(status: u16, body: &'static str) -> Fault {
    Fault::Status(status, Vec::new(), body)
}

/// The refusal of a pull of `a:1` from a registry that answers requests for this path so.
fn refused(path: &str, faults: Vec<Fault>) -> String {
    let (registry, _) = filled();
    registry.misbehave(path, faults);
    let installation = Installation::bare().unwrap();
    let said = refusal(&pull(&installation, &registry.host(), "a:1"));
    assert_nothing_of_images_left(&installation);
    said
}

#[test]
fn a_connection_that_is_cut_is_taken_up_where_it_ended() {
    let (registry, layers) = filled();
    registry.misbehave(&layers[0], [Fault::Cut(300_000), Fault::Cut(100_000), Fault::Cut(0)]);
    registry.misbehave(&layers[1], [Fault::Cut(500_000), Fault::IgnoreRange]);
    let installation = Installation::bare().unwrap();
    pulled(&pull(&installation, &registry.host(), "a:1"));
    let ranges = |digest: &str| {
        let asked = registry.asked().into_iter().filter(|asked| asked.path.contains(digest));
        asked.map(|asked| asked.range.unwrap_or_default()).collect::<Vec<_>>()
    };
    assert_eq!(ranges(&layers[0]), ["", "bytes=300000-", "bytes=400000-", "bytes=400000-"]);
    assert_eq!(ranges(&layers[1]), ["", "bytes=500000-"]);
}

#[test]
fn a_registry_that_never_stops_failing_is_given_up() {
    let cuts = || std::iter::repeat_n(Fault::Cut(0), 100).collect();
    let said = refused("/blobs/", cuts());
    assert!(said.contains("broke while the blob sha256:"), "{said}");
    let said = refused("/manifests/", std::iter::repeat_n(status(503, "down"), 100).collect());
    assert!(said.contains("is busy (503: down)"), "{said}");
}

#[test]
fn a_busy_registry_is_asked_again_when_it_says() {
    let (registry, layers) = filled();
    let later = |code| Fault::Status(code, vec![("Retry-After", "1".to_owned())], "later");
    registry.misbehave("/manifests/", [later(429), status(503, "")]);
    registry.misbehave(&layers[0], [later(503)]);
    let installation = Installation::bare().unwrap();
    pulled(&pull(&installation, &registry.host(), "a:1"));
    assert_eq!((registry.count("/manifests/"), registry.count(&layers[0])), (3, 2));
    // For longer than a minute nobody waits without knowing.
    let hour = Fault::Status(429, vec![("Retry-After", "3600".to_owned())], "slow down");
    let said = refused("/manifests/", vec![hour]);
    assert!(said.contains("busy (429: slow down); it asks to wait 3600 s"), "{said}");
}

#[test]
fn what_is_not_what_it_should_be_is_refused() {
    let wrong = || vec![Fault::Wrong, Fault::Wrong, Fault::Wrong, Fault::Wrong];
    let (registry, layers) = filled();
    drop(registry);
    let said = refused(&layers[1], wrong());
    assert!(said.contains("digest mismatch"), "{said}");
    assert!(said.contains(&format!("not {}", layers[1])), "{said}");
    let said = refused(&layers[1], vec![Fault::TooMuch; 8]);
    assert!(said.contains("sent more than"), "{said}");
    // Once may be an accident, for example on this host's disk.
    let (registry, layers) = filled();
    registry.misbehave(&layers[1], [Fault::Wrong]);
    pulled(&pull(&Installation::bare().unwrap(), &registry.host(), "a:1"));
}

#[test]
fn a_manifest_of_another_digest_is_refused() {
    let (registry, _) = filled();
    let (manifest, _) = registry.image("b", "1", "amd64", &[layer("b", 10)]);
    registry.misbehave("/manifests/", [Fault::Wrong]);
    let installation = Installation::bare().unwrap();
    let said = refusal(&pull(&installation, &registry.host(), &format!("b@{manifest}")));
    assert!(said.contains("digest mismatch") && said.contains(&manifest), "{said}");
    pulled(&pull(&installation, &registry.host(), &format!("b@{manifest}")));
}

#[test]
fn a_page_for_people_is_no_manifest() {
    let page = "<!DOCTYPE html><title>Sign in</title>";
    let html = |code| Fault::Status(code, vec![("Content-Type", "text/html".to_owned())], page);
    for code in [200, 404] {
        let said = refused("/manifests/", vec![html(code)]);
        assert!(said.contains("is no image registry") && said.contains("HTML"), "{said}");
    }
}

#[test]
fn refused_access_says_what_to_do() {
    let denied = r#"{"errors":[{"code":"DENIED","message":"not\nyours"}]}"#;
    for fault in [
        status(401, denied),
        status(403, denied),
        Fault::Status(401, vec![("WWW-Authenticate", "Basic realm=\"x\"".to_owned())], denied),
    ] {
        let said = refused("/manifests/", vec![fault.clone(), fault]);
        assert!(said.contains("refused access") && said.contains("docker login"), "{said}");
    }
}

#[test]
fn what_is_no_image_for_containers_is_refused() {
    let registry = FakeRegistry::new().unwrap();
    let digest = format!("sha256:{}", "1".repeat(64));
    let config = |kind: &str| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"{kind}","digest":"{digest}","size":2}},"layers":[]}}"#
        )
    };
    registry.manifest("a", "helm", MANIFEST, &config("application/vnd.cncf.helm.config.v1+json"));
    registry.manifest("a", "old", "text/plain", r#"{"schemaVersion":1,"name":"a"}"#);
    registry.manifest("a", "odd", MANIFEST, r#"{"schemaVersion":2,"config":7}"#);
    registry.manifest("a", "none", INDEX, r#"{"schemaVersion":2,"manifests":[]}"#);
    let huge = config("application/vnd.oci.image.config.v1+json").replace(":2}", ":99999999}");
    registry.manifest("a", "huge", MANIFEST, &huge);
    registry.manifest("a", "long", MANIFEST, &config(&"x".repeat(3_000_000)));
    let long = format!(r#"{{"schemaVersion":"{}"}}"#, "x".repeat(3_000_000));
    registry.manifest("a", "word", MANIFEST, &long);
    let whole = config("application/vnd.oci.image.config.v1+json");
    registry.manifest("a", "kind", INDEX, &whole);
    let both = whole.replace("\"layers\"", "\"manifests\":[],\"layers\"");
    registry.manifest("a", "both", MANIFEST, &both);
    let bare = both.replace(&format!("\"mediaType\":\"{MANIFEST}\","), "");
    registry.manifest("a", "bare", "x", &bare);
    let installation = Installation::bare().unwrap();
    for (tag, wanted) in [
        ("helm", "is not a container image"),
        ("old", "its manifest is of an old version"),
        ("odd", "its manifest cannot be read"),
        ("none", "names no image"),
        ("huge", "over the limit"),
        ("long", "its config is \"xxx"),
        ("word", "its manifest cannot be read"),
        ("kind", "and the registry calls it"),
        ("both", "its manifest is an index as well"),
        ("bare", "its manifest is an index as well"),
        ("not-there", "no such tag or digest"),
    ] {
        let said = refusal(&pull(&installation, &registry.host(), &format!("a:{tag}")));
        assert!(said.contains(wanted) && said.len() < 1000, "{tag}: {said}");
    }
}

#[test]
fn what_a_registry_makes_us_wait_for_is_said() {
    let (registry, _) = filled();
    let later = Fault::Status(503, vec![("Retry-After", "3".to_owned())], "no\u{202e}won");
    registry.misbehave("/manifests/", [later]);
    let (host, name) = (registry.host(), registry.name("a:1"));
    let installation = Installation::bare().unwrap();
    let output = installation.output(&["pull", "--insecure-registry", &host, &name]).unwrap();
    pulled(&output);
    let said = stderr(&output);
    assert!(said.contains("trying again") && said.contains("asks to wait 3 s"), "{said}");
    assert!(!said.contains('\u{202e}'), "{said}");
}

#[test]
fn a_realm_that_is_no_web_address_is_refused() {
    for realm in ["file:///etc/passwd", "data:text/plain,x", "nothing"] {
        let challenge = vec![("WWW-Authenticate", format!("Bearer realm=\"{realm}\""))];
        let said = refused("/manifests/", vec![Fault::Status(401, challenge, "")]);
        assert!(said.contains("the realm that it names is no "), "{said}");
    }
}

#[test]
fn a_registry_that_is_not_there_is_named() {
    let installation = Installation::bare().unwrap();
    let said = refusal(&pull(&installation, "127.0.0.1:1", "a"));
    assert!(said.contains("could not connect to 127.0.0.1:1: "), "{said}");
    let said = refusal(&pull(&installation, "registry.invalid", "a"));
    assert!(said.contains("unknown host registry.invalid"), "{said}");
    // Without the flag it is asked by TLS.
    let (registry, _) = filled();
    let output = installation.output(&["-q", "pull", &registry.name("a:1")]).unwrap();
    let flag = format!("--insecure-registry {}", registry.host());
    assert!(refusal(&output).contains(&flag), "{}", stderr(&output));
    let output = installation.output(&["pull", "Nothing"]).unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_mirror_is_asked_first_and_believed_only_what_can_be_checked() {
    let (origin, layers) = filled();
    let (mirror, _) = filled();
    let installation = Installation::bare().unwrap();
    std::fs::create_dir_all(installation.home()).unwrap();
    let config = format!(
        "[registry]\ninsecure = [{:?}, {:?}]\n[registry.mirrors]\n{:?} = [{:?}]\n",
        origin.host(),
        mirror.host(),
        origin.host(),
        mirror.host()
    );
    std::fs::write(installation.home().join("config.toml"), config).unwrap();
    // It has the manifest, and lies about a layer: the origin has the last word.
    mirror.misbehave(&layers[0], [status(404, "")]);
    pulled(&installation.output(&["-q", "pull", &origin.name("a:1")]).unwrap());
    assert_eq!((origin.count("/manifests/"), origin.count(&layers[0])), (0, 1));
    let listed = stdout(&installation.output(&["image", "ls"]).unwrap());
    assert!(listed.contains(&origin.host()) && !listed.contains(&mirror.host()), "{listed}");
    // Nor is it believed when it sends something else.
    let name = origin.name("a:1");
    pulled(&installation.output(&["image", "rm", &name]).unwrap());
    mirror.misbehave(&layers[0], [Fault::Wrong, Fault::Wrong]);
    pulled(&installation.output(&["-q", "pull", &name]).unwrap());
    assert_eq!((origin.count("/manifests/"), origin.count(&layers[0])), (0, 2));
    // One that has nothing is passed over.
    mirror.misbehave("/manifests/", [status(404, "")]);
    pulled(&installation.output(&["-q", "pull", &origin.name("a:1")]).unwrap());
    assert_eq!(origin.count("/manifests/"), 1);
}

#[test]
fn a_registry_that_begins_anew_each_time_is_given_up() {
    let registry = FakeRegistry::new().unwrap();
    let (_, layers) = registry.image("a", "1", "amd64", &[layer("big", 4 << 20)]);
    let cuts = [3 << 20, 1 << 20].map(Fault::IgnoreRangeAndCut);
    registry.misbehave(&layers[0], cuts.into_iter().cycle().take(100));
    let installation = Installation::bare().unwrap();
    let said = refusal(&pull(&installation, &registry.host(), "a:1"));
    assert!(said.contains("broke while the blob sha256:"), "{said}");
    assert!(registry.count(&layers[0]) < 10, "{}", registry.count(&layers[0]));
    assert_nothing_of_images_left(&installation);
}

#[test]
fn the_image_of_this_platform_is_chosen_from_an_index() {
    let registry = FakeRegistry::new().unwrap();
    let (arm, _) = registry.image("a", "arm", "arm64", &[layer("arm", 10)]);
    let (amd, _) = registry.image("a", "amd", "amd64", &[layer("amd", 10)]);
    let entry = |digest: &str, architecture: &str| {
        format!(
            r#"{{"mediaType":"{MANIFEST}","digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#
        )
    };
    let index = |entries: &[String]| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#,
            entries.join(",")
        )
    };
    registry.manifest("a", "1", INDEX, &index(&[entry(&arm, "arm64"), entry(&amd, "amd64")]));
    registry.manifest("a", "2", INDEX, &index(&[entry(&arm, "arm64")]));
    let host = registry.host();
    let installation = Installation::bare().unwrap();
    let json = |flags: &[&str]| {
        let name = registry.name("a:1");
        let mut args = vec!["-q", "pull", "--json", "--insecure-registry", &host];
        args.extend(flags);
        args.push(&name);
        let output = installation.output(&args).unwrap();
        pulled(&output);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    assert_eq!(json(&[])["digest"], amd);
    assert_eq!(json(&["--platform", "linux/amd64"])["new"], false);
    let other = json(&["--platform", "linux/arm64"]);
    assert_eq!((&other["digest"], &other["platform"]), (&arm.into(), &"linux/arm64".into()));
    let name = registry.name("a:1");
    let run = installation.output(&["run", "--no-network", "--image", &name]).unwrap();
    assert_eq!(run.status.code(), Some(125), "{run:?}");
    assert!(stderr(&run).contains("is for linux/arm64"), "{}", stderr(&run));
    let said = refusal(&pull(&installation, &host, "a:2"));
    assert!(said.contains("linux/arm64") && said.contains("linux/amd64"), "{said}");
    let output = installation.output(&["pull", "--platform", "arm64", &name]).unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_token_is_fetched_with_the_login_and_sent_to_nobody_else() {
    let (registry, layers) = filled();
    let realm = FakeRegistry::new().unwrap();
    let challenge = format!(
        "Bearer realm=\"http://{}/token\",service=\"s\",scope=\"repository:a:pull\"",
        realm.host()
    );
    let wants = || Fault::Status(401, vec![("WWW-Authenticate", challenge.clone())], "");
    // The token is not taken for ever.
    registry.misbehave("/manifests/", [wants()]);
    registry.misbehave(&layers[0], [wants()]);
    let token = |text| Fault::Status(200, Vec::new(), text);
    realm.misbehave("/token", [token(r#"{"token":"t1"}"#), token(r#"{"access_token":"t2"}"#)]);
    let installation = Installation::bare().unwrap();
    std::fs::create_dir_all(installation.home()).unwrap();
    let login = format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, registry.host());
    std::fs::write(installation.home().join("config.json"), login).unwrap();
    let (host, name) = (registry.host(), registry.name("a:1"));
    let mut command =
        installation.command(&["-q", "pull", "--insecure-registry", &host, &name]).unwrap();
    pulled(&command.env("DOCKER_CONFIG", installation.home()).output().unwrap());
    for asked in realm.asked() {
        assert_eq!(asked.authorization.as_deref(), Some("Basic dTpw"));
        assert!(asked.path.contains("service=s") && asked.path.contains("account=u"), "{asked:?}");
    }
    assert_eq!(realm.asked().len(), 2);
    let sent: Vec<_> =
        registry.asked().into_iter().filter_map(|asked| asked.authorization).collect();
    assert!(sent.iter().all(|sent| sent == "Bearer t1" || sent == "Bearer t2"), "{sent:?}");
    assert!(sent.contains(&"Bearer t2".to_owned()), "{sent:?}");
}

#[test]
fn layers_are_shared_and_go_with_the_last_image_that_needs_them() {
    let registry = FakeRegistry::new().unwrap();
    let (base, own) = (layer("base", 1000), layer("own", 1000));
    let digest = digest_of(&base);
    registry.image("a", "1", "amd64", std::slice::from_ref(&base));
    registry.image("b", "1", "amd64", &[base, own.clone()]);
    let (host, installation) = (registry.host(), Installation::bare().unwrap());
    pulled(&pull(&installation, &host, "a:1"));
    pulled(&pull(&installation, &host, "b:1"));
    // b's manifest, config and one layer are all that is new.
    assert_eq!(registry.count(&digest), 1, "{:?}", registry.asked());
    let remove = |name: &str| {
        let name = format!("{host}/{name}");
        pulled(&installation.output(&["image", "rm", &name]).unwrap());
    };
    let has = |digest: &str| {
        let hex = digest.trim_start_matches("sha256:");
        content(&installation).iter().any(|path| path.to_string_lossy().contains(hex))
    };
    remove("a:1");
    assert!(has(&digest) && has(&digest_of(&own)));
    remove("b:1");
    assert!(content(&installation).is_empty(), "{:?}", content(&installation));
    assert_nothing_of_images_left(&installation);
}
