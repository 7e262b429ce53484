//! Who a command runs as: `uid`, `uid:gid`, `name`, `name:group`, looked up in the image's files.
//!
//! A number need not be in `/etc/passwd`; its group is then 0. The supplementary groups are those
//! that `/etc/group` lists for the user's name, and none if a group was given.

use std::path::Path;

use super::accounts::{self, id, records};

/// Who a command runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// The user.
    pub(super) uid: u32,
    /// The group.
    pub(super) gid: u32,
    /// The supplementary groups.
    pub(super) groups: Vec<u32>,
    /// The user's name, if it is known.
    pub(super) name: Option<Vec<u8>>,
    /// The user's home directory.
    pub(super) home: Vec<u8>,
}

/// The kernel takes no more supplementary groups.
const MAX_GROUPS: usize = 65_536;

/// One user of `/etc/passwd`.
struct Account<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// Looks a user up in the files below `root`; nothing given means root.
///
/// # Errors
/// One line for the user: what is not known, or what cannot be read.
pub(super) fn resolve(root: &Path, wanted: Option<&str>) -> Result<Identity, String> {
    let read = |name: &str| {
        let path = root.join(name);
        accounts::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let passwd = read("etc/passwd");
    let group = read("etc/group");
    match wanted {
        // Root needs no files. What is wrong with them is for those to hear who do.
        None => resolve_in(&passwd.unwrap_or_default(), &group.unwrap_or_default(), "0"),
        Some(wanted) => resolve_in(&passwd?, &group?, wanted),
    }
}

fn resolve_in(passwd: &[u8], group: &[u8], wanted: &str) -> Result<Identity, String> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted, None),
    };
    if user.is_empty() || wanted_group == Some("") {
        return Err(format!("user {wanted:?} is not of the form user[:group]"));
    }
    let account = find_account(passwd, user.as_bytes());
    let uid = match (&account, id(user.as_bytes())) {
        (Some(account), _) => account.uid,
        (None, Some(uid)) => uid,
        (None, None) => return Err(format!("user {user:?} is not in /etc/passwd")),
    };
    let (gid, groups) = match wanted_group {
        Some(name) => (find_group(group, name)?, Vec::new()),
        None => match &account {
            Some(account) => (account.gid, groups_of(group, account.name)),
            None => (0, Vec::new()),
        },
    };
    let name = match &account {
        Some(account) => Some(account.name.to_vec()),
        None => (uid == 0).then(|| b"root".to_vec()),
    };
    let home = match &account {
        Some(account) if !account.home.is_empty() => account.home.to_vec(),
        _ if uid == 0 => b"/root".to_vec(),
        _ => b"/".to_vec(),
    };
    Ok(Identity { uid, gid, groups, name, home })
}

/// The first line with this name or this number.
fn find_account<'a>(passwd: &'a [u8], wanted: &[u8]) -> Option<Account<'a>> {
    let number = id(wanted);
    records(passwd, 4).find_map(|record| {
        let account = Account {
            name: record[0],
            uid: id(record[2])?,
            gid: id(record[3])?,
            home: record.get(5).copied().unwrap_or_default(),
        };
        (account.name == wanted || Some(account.uid) == number).then_some(account)
    })
}

fn find_group(group: &[u8], wanted: &str) -> Result<u32, String> {
    let number = id(wanted.as_bytes());
    let found = records(group, 3).find_map(|record| {
        let gid = id(record[2])?;
        (record[0] == wanted.as_bytes() || Some(gid) == number).then_some(gid)
    });
    found.or(number).ok_or_else(|| format!("group {wanted:?} is not in /etc/group"))
}

fn groups_of(group: &[u8], name: &[u8]) -> Vec<u32> {
    let mut groups: Vec<u32> = records(group, 4)
        .filter(|record| record[3].split(|byte| *byte == b',').any(|one| one == name))
        .filter_map(|record| id(record[2]))
        .take(MAX_GROUPS)
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] = b"# comment:x:9:9::/:\n\
        root:x:0:0:root:/root:/bin/sh\n\
        broken\n\
        bad:x:abc:0::/:\n\
        app:x:1000:1001:App:/home/app:/bin/sh\n\
        1234:x:77:78::/digits:\n\
        nohome:x:5:6\n\
        app:x:2000:2000::/second:\n";
    const GROUP: &[u8] =
        b"root:x:0:root\nwheel:x:10:root,app\nweb:x:33:app,www\napp:x:1001:\nx:x:10:app\n";

    fn ids(wanted: &str) -> (u32, u32, Vec<u32>) {
        let identity = resolve_in(PASSWD, GROUP, wanted).unwrap();
        (identity.uid, identity.gid, identity.groups)
    }

    #[test]
    fn names_and_numbers_are_found() {
        assert_eq!(ids("root"), (0, 0, vec![0, 10]));
        assert_eq!(ids("app"), (1000, 1001, vec![10, 33]));
        assert_eq!(ids("1000"), (1000, 1001, vec![10, 33]));
        assert_eq!(ids("app:web"), (1000, 33, vec![]));
        assert_eq!(ids("app:4242"), (1000, 4242, vec![]));
        assert_eq!(ids("4000"), (4000, 0, vec![]));
        assert_eq!(ids("4000:5000"), (4000, 5000, vec![]));
        assert_eq!(ids("nohome"), (5, 6, vec![]));
        assert_eq!(ids("1234"), (77, 78, vec![]), "a name of digits is a name first");
    }

    #[test]
    fn homes_and_names_come_from_the_account() {
        let of = |wanted| {
            let identity = resolve_in(PASSWD, GROUP, wanted).unwrap();
            (identity.name, identity.home)
        };
        assert_eq!(of("1000"), (Some(b"app".to_vec()), b"/home/app".to_vec()));
        assert_eq!(of("nohome"), (Some(b"nohome".to_vec()), b"/".to_vec()));
        assert_eq!(of("4000"), (None, b"/".to_vec()));
        let root = resolve_in(b"", b"", "0").unwrap();
        assert_eq!(root.name, Some(b"root".to_vec()));
        assert_eq!(root.home, b"/root".to_vec());
    }

    #[test]
    fn what_is_unknown_is_named() {
        for (wanted, word) in [
            ("nobody", "\"nobody\""),
            ("app:nogroup", "\"nogroup\""),
            ("", "\"\""),
            (":0", "\":0\""),
            ("app:", "\"app:\""),
            ("bad", "\"bad\""),
            ("4294967295", "\"4294967295\""),
            ("-1", "\"-1\""),
        ] {
            let line = resolve_in(PASSWD, GROUP, wanted).unwrap_err();
            assert!(line.contains(word), "{wanted:?}: {line}");
        }
    }

    #[test]
    fn root_needs_no_readable_files_and_others_do() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("etc/passwd")).unwrap();
        assert_eq!(resolve(root.path(), None).unwrap().uid, 0);
        assert!(resolve(root.path(), Some("app")).is_err());
    }

    proptest! {
        #[test]
        fn any_files_and_any_user_give_an_identity_or_a_line(
            passwd in proptest::collection::vec(any::<u8>(), 0..400),
            group in proptest::collection::vec(any::<u8>(), 0..400),
            wanted in ".{0,20}",
        ) {
            match resolve_in(&passwd, &group, &wanted) {
                Ok(identity) => prop_assert_ne!(identity.uid, u32::MAX),
                Err(line) => prop_assert!(!line.contains('\n')),
            }
        }

        #[test]
        fn a_user_that_is_listed_is_found(uid in 0..u32::MAX, gid in 0..u32::MAX, extra in 0..u32::MAX) {
            let passwd = format!("a:x:1:1::/:\nme:x:{uid}:{gid}::/me:\n");
            let group = format!("g:x:{extra}:you,me\n");
            let identity = resolve_in(passwd.as_bytes(), group.as_bytes(), "me").unwrap();
            prop_assert_eq!((identity.uid, identity.gid), (uid, gid));
            prop_assert_eq!(identity.groups, vec![extra]);
        }
    }
}
