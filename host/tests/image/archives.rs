//! Tar streams and image archives, honest and otherwise.

use std::io::Write as _;

use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

/// One tar member.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) link: Vec<u8>,
    pub(crate) data: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
    pub(crate) pax: Vec<(String, Vec<u8>)>,
}

pub(crate) fn entry(kind: EntryType, name: impl AsRef<[u8]>) -> Entry {
    Entry {
        name: name.as_ref().to_vec(),
        kind: kind.as_byte(),
        link: Vec::new(),
        data: Vec::new(),
        mode: if kind == EntryType::Directory { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        mtime: 1_000_000_000,
        device: (0, 0),
        pax: Vec::new(),
    }
}

pub(crate) fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Entry {
    Entry { data: data.as_ref().to_vec(), ..entry(EntryType::Regular, name) }
}

pub(crate) fn dir(name: impl AsRef<[u8]>) -> Entry {
    entry(EntryType::Directory, name)
}

pub(crate) fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Entry {
    Entry { link: target.as_ref().to_vec(), ..entry(EntryType::Symlink, name) }
}

pub(crate) fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Entry {
    Entry { link: target.as_ref().to_vec(), ..entry(EntryType::Link, name) }
}

pub(crate) fn device(kind: EntryType, name: &str, major: u32, minor: u32) -> Entry {
    Entry { device: (major, minor), ..entry(kind, name) }
}

impl Entry {
    pub(crate) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub(crate) fn owner(self, uid: u64, gid: u64) -> Self {
        Self { uid, gid, ..self }
    }

    pub(crate) fn mtime(self, mtime: u64) -> Self {
        Self { mtime, ..self }
    }

    pub(crate) fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn xattr(self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(&format!("SCHILY.xattr.{key}"), value)
    }

    fn write(&self, out: &mut Vec<u8>) {
        if !self.pax.is_empty() {
            let mut text = Vec::new();
            for (key, value) in &self.pax {
                text.extend(pax_record(key, value));
            }
            let records = Entry { data: text, kind: b'x', ..file("pax", "") };
            records.write(out);
        }
        for (long, kind) in [(&self.name, b'L'), (&self.link, b'K')] {
            if long.len() > 100 {
                let data = [long.as_slice(), b"\0"].concat();
                Entry { data, kind, ..file("././@LongLink", "") }.write(out);
            }
        }
        out.extend_from_slice(self.header().as_bytes());
        pad(out, &self.data);
    }

    /// The header alone: names as they are, whatever they are.
    pub(crate) fn header(&self) -> Header {
        let mut header = Header::new_gnu();
        let old = header.as_old_mut();
        let name = &self.name[..self.name.len().min(100)];
        let link = &self.link[..self.link.len().min(100)];
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..link.len()].copy_from_slice(link);
        old.linkflag = [self.kind];
        header.set_mode(self.mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header.set_mtime(self.mtime);
        header.set_size(self.data.len() as u64);
        if matches!(self.kind, b'3' | b'4') {
            header.set_device_major(self.device.0).unwrap();
            header.set_device_minor(self.device.1).unwrap();
        }
        header.set_cksum();
        header
    }
}

pub(crate) fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

pub(crate) fn pad(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// A tar stream without its end mark.
pub(crate) fn members(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        entry.write(&mut out);
    }
    out
}

/// A tar stream.
pub(crate) fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut out = members(entries);
    out.resize(out.len() + 1024, 0);
    out
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Two members, as pigz and others write.
pub(crate) fn gzip_twice(data: &[u8]) -> Vec<u8> {
    let (one, two) = data.split_at(data.len() / 2);
    [gzip(one), gzip(two)].concat()
}

pub(crate) fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

pub(crate) fn sha256(data: &[u8]) -> String {
    hex::encode(Sha256::digest(data))
}

pub(crate) fn host() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

type Packer = fn(&[u8]) -> Vec<u8>;

/// An image to be put into an archive.
#[derive(Clone)]
pub(crate) struct Image {
    /// Uncompressed layers, and how they are packed.
    pub(crate) layers: Vec<(Vec<u8>, Packer)>,
    pub(crate) config: serde_json::Value,
    pub(crate) architecture: String,
    /// Replaces the true ones.
    pub(crate) diff_ids: Option<Vec<String>>,
}

impl Image {
    pub(crate) fn new(layers: &[Vec<u8>]) -> Self {
        let plain: Packer = <[u8]>::to_vec;
        Self {
            layers: layers.iter().map(|layer| (layer.clone(), plain)).collect(),
            config: serde_json::json!({}),
            architecture: host().to_owned(),
            diff_ids: None,
        }
    }

    pub(crate) fn of(layers: &[&[Entry]]) -> Self {
        Self::new(&layers.iter().map(|entries| tar(entries)).collect::<Vec<_>>())
    }

    pub(crate) fn packed(mut self, packer: Packer) -> Self {
        for layer in &mut self.layers {
            layer.1 = packer;
        }
        self
    }

    pub(crate) fn config_text(&self) -> Vec<u8> {
        let ids = self.layers.iter().map(|(layer, _)| format!("sha256:{}", sha256(layer)));
        let ids = self.diff_ids.clone().unwrap_or_else(|| ids.collect());
        let document = serde_json::json!({
            "architecture": self.architecture, "os": "linux", "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": ids },
        });
        document.to_string().into_bytes()
    }

    /// The members that `docker save` made before version 25: the list of layers comes last.
    pub(crate) fn saved_members(&self) -> Vec<Entry> {
        let config = self.config_text();
        let config_name = format!("{}.json", sha256(&config));
        let mut names = Vec::new();
        let mut entries = Vec::new();
        for (number, (layer, packer)) in self.layers.iter().enumerate() {
            let name = format!("{number:064x}/layer.tar");
            entries.push(dir(format!("{number:064x}/")));
            entries.push(file(format!("{number:064x}/VERSION"), "1.0"));
            entries.push(file(&name, packer(layer)));
            names.push(name);
        }
        let manifest = serde_json::json!([
            { "Config": config_name, "RepoTags": ["test:latest"], "Layers": names }
        ]);
        entries.push(file(&config_name, config));
        entries.push(file("manifest.json", manifest.to_string()));
        entries
    }

    pub(crate) fn saved(&self) -> Vec<u8> {
        tar(&self.saved_members())
    }

    /// The blobs of an OCI layout; answers the manifest's descriptor as well.
    pub(crate) fn oci_blobs(&self) -> (Vec<Entry>, serde_json::Value) {
        let mut entries = Vec::new();
        let mut put = |kind: &str, data: Vec<u8>| {
            let (hex, size) = (sha256(&data), data.len());
            entries.push(file(format!("blobs/sha256/{hex}"), data));
            serde_json::json!({ "mediaType": kind, "digest": format!("sha256:{hex}"), "size": size })
        };
        let pack = |(layer, packer): &(Vec<u8>, Packer)| packer(layer);
        let layers: Vec<_> = (self.layers.iter())
            .map(|layer| put("application/vnd.oci.image.layer.v1.tar", pack(layer)))
            .collect();
        let config = put("application/vnd.oci.image.config.v1+json", self.config_text());
        let manifest =
            serde_json::json!({ "schemaVersion": 2, "config": config, "layers": layers });
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let mut descriptor = put(kind, manifest.to_string().into_bytes());
        descriptor["platform"] =
            serde_json::json!({ "os": "linux", "architecture": self.architecture });
        (entries, descriptor)
    }

    pub(crate) fn oci(&self) -> Vec<u8> {
        let (entries, descriptor) = self.oci_blobs();
        oci(entries, &serde_json::json!([descriptor]))
    }
}

/// An OCI layout of these blobs and these manifests in its index.
pub(crate) fn oci(mut entries: Vec<Entry>, manifests: &serde_json::Value) -> Vec<u8> {
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": manifests });
    entries.push(file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#));
    entries.push(file("index.json", index.to_string()));
    tar(&entries)
}
