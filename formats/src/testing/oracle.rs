//! Judges of images besides our own drivers: `qemu-img`, and the rule for the footers of a VHD.

use std::path::Path;

use super::pages::Pages;
use super::programs;
use super::rig::{PASSPHRASE, Rig, read_all};

fn words(named: &[String]) -> impl Iterator<Item = &str> {
    named.iter().map(String::as_str)
}

/// How QEMU is told about an image, with its keys.
fn named(rig: &Rig, image: &str) -> Vec<String> {
    let layers = &rig.case.layers;
    let format = layers[0].format.name();
    if layers.iter().all(|layer| layer.key.is_none()) {
        return ["-f", format, image].map(str::to_owned).into();
    }
    let mut options = format!("driver={format},file.filename={image}");
    let mut at = String::new();
    for layer in layers {
        match (layer.format.name(), &layer.key) {
            ("qcow2", Some(_)) => options += &format!(",{at}encrypt.format=luks,{at}encrypt.key-secret=key"),
            (_, Some(_)) => options += &format!(",{at}key-secret=key"),
            _ => {}
        }
        at += "backing.";
    }
    let secret = format!("secret,id=key,data={PASSPHRASE}");
    ["--object".to_owned(), secret, "--image-opts".to_owned(), options].into()
}

/// Saves all files of a chain into a folder, under the names by which its images know each other.
fn save(rig: &Rig, folder: &Path) -> Result<String, String> {
    let mut first = None;
    for number in (0..rig.case.layers.len()).flat_map(|layer| rig.files(layer)) {
        let name = rig.store.name(*number);
        let path = folder.join(name.trim_start_matches("mem/"));
        rig.store.pages(*number).save(&path).map_err(|error| error.to_string())?;
        first.get_or_insert(path);
    }
    first.map(|path| path.display().to_string()).ok_or_else(|| "no files".to_string())
}

/// Judges the top image of a chain: what others than we must be able to say of it after a crash.
///
/// # Errors
/// What they say.
pub fn judge(rig: &Rig) -> Result<(), String> {
    match rig.case.layers[0].format.name() {
        "qcow2" => qcow2_is_sound(rig),
        "vhd" => vhd_has_footer(&rig.store.pages(rig.files(0)[0])),
        _ => Ok(()),
    }
}

/// [`judge`], and for a chain that QEMU knows whole: it reads the same bytes. For images that nobody has open.
///
/// # Errors
/// The difference.
pub fn judge_closed(rig: &Rig) -> Result<(), String> {
    judge(rig)?;
    // QEMU takes differencing VHDs for dynamic ones; and it has sizes of its own for some creators' VHDs.
    let knows = |(index, layer): (usize, &super::rig::LayerCase)| {
        layer.format.name() != "vhd" && (layer.format.name() != "raw" || index > 0)
    };
    if !rig.case.layers.iter().enumerate().all(knows) {
        return Ok(());
    }
    let volume = rig.open(false).map_err(|error| error.to_string())?;
    let ours = rig.store.run(read_all(&volume)).map_err(|error| error.to_string())?;
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let image = save(rig, folder.path())?;
    let raw = folder.path().join("converted.raw");
    let raw = raw.display().to_string();
    let named = named(rig, &image);
    let command: Vec<_> =
        ["qemu-img", "convert", "-O", "raw"].into_iter().chain(words(&named)).chain([&*raw]).collect();
    let Some(output) = programs::run(folder.path(), &command) else { return Ok(()) };
    if !output.status.success() {
        return Err(format!("qemu-img convert: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let theirs = Pages::load(Path::new(&raw)).map_err(|error| error.to_string())?;
    match Pages::of(&ours).first_difference(&theirs) {
        Some(at) => Err(format!("qemu-img reads another byte than we at {at}")),
        None => Ok(()),
    }
}

/// `qemu-img check` finds leaks at most.
fn qcow2_is_sound(rig: &Rig) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let image = save(rig, folder.path())?;
    let named = named(rig, &image);
    let command: Vec<_> = ["qemu-img", "check"].into_iter().chain(words(&named)).collect();
    let Some(output) = programs::run(folder.path(), &command) else { return Ok(()) };
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        code => Err(format!(
            "qemu-img check ends with {code:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// The footer at the end is valid, or its copy at the begin is (which every reader knows how to use).
///
/// # Errors
/// Neither is valid.
pub fn vhd_has_footer(image: &Pages) -> Result<(), String> {
    let valid = |offset: u64| {
        let footer = image.bytes(offset..offset + 512);
        let sum = footer.iter().enumerate().filter(|(at, _)| !(64..68).contains(at));
        let sum = !sum.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)));
        footer.starts_with(b"conectix") && footer[64..68] == sum.to_be_bytes()
    };
    if image.length() >= 512 && (valid(image.length() - 512) || valid(0)) {
        return Ok(());
    }
    Err("a VHD without a valid footer at its end or begin".to_string())
}
