//! What changes nothing: `info`, `check` (and `repair`, which is a check that may), `map`, `compare`, `measure`.

use std::cell::RefCell;

use formats::driver::{Create, Findings, Repair};
use formats::error::{Error, ErrorKind};
use formats::tools::compare::Difference;
use formats::tools::layers;
use formats::tools::walk::{Span, State};
use serde_json::{Value, json};

use super::args::MeasureArgs;
use super::chain::{Chain, Gate, Opened};
use super::failure::Failure;
use super::file::{OpenFile, Want};
use super::name::{ImageName, format};
use super::progress::Bar;
use super::{engine, output};

/// `info`.
///
/// # Errors
/// The image cannot be read, or with `whole` one of its parents.
pub fn info(name: &ImageName, whole: bool, share: bool, gate: &Gate, json: bool) -> Result<u8, Failure> {
    let want = if share { Want::Look } else { Want::Read };
    let images = match whole {
        true => Chain::open_for(name, &[want; formats::volume::DEPTH_MAX], gate)?.images,
        false => vec![Opened::open(name, want, gate)?],
    };
    let mut values: Vec<_> = images.iter().map(info_json).collect();
    let texts: Vec<_> = images.iter().map(info_text).collect();
    let value = if whole { Value::Array(values) } else { values.remove(0) };
    output::print(json, &value, &texts.join("\n"))?;
    Ok(0)
}

/// Bytes that the files of an image have together, and that their stores hold for them.
fn file_bytes(image: &Opened) -> (u64, u64) {
    let length = |file: &OpenFile| file.blocking().map_or(0, |file| formats::file::ImageFile::length(&*file));
    let sum = |what: &dyn Fn(&OpenFile) -> u64| image.files.iter().map(what).sum();
    (sum(&length), sum(&OpenFile::allocated_bytes))
}

fn info_json(image: &Opened) -> Value {
    let description = &image.description;
    let (length, allocated) = file_bytes(image);
    let parent = description.backing.as_ref().map(|link| json!({ "type": link.format, "paths": link.paths }));
    let data_files: Vec<_> = image.files.iter().skip(1).map(|file| file.path.display().to_string()).collect();
    let properties: serde_json::Map<_, _> =
        description.properties.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    json!({
        "image": image.name.to_string(),
        "type": image.name.format.name(),
        "path": image.name.path,
        "size": description.size,
        "file_bytes": length,
        "allocated_bytes": allocated,
        "parent": parent,
        "data_files": data_files,
        "encryption": description.encryption.as_ref().map(|encryption| &encryption.words),
        "writable": description.writable.is_ok(),
        "read_only_reason": description.writable.as_ref().err(),
        "properties": properties,
    })
}

fn info_text(image: &Opened) -> String {
    let description = &image.description;
    let (length, allocated) = file_bytes(image);
    let mut lines = vec![
        ("image", image.name.to_string()),
        ("size", output::bytes(description.size)),
        ("file", format!("{}, {} on the store", output::bytes(length), output::bytes(allocated))),
    ];
    if let Some(link) = &description.backing {
        let format = link.format.as_deref().unwrap_or("(type not stated)");
        lines.push(("parent", format!("{format}:{}", link.paths.join(" or "))));
    }
    lines.extend(image.files.iter().skip(1).map(|file| ("data file", file.path.display().to_string())));
    if let Some(encryption) = &description.encryption {
        lines.push(("encryption", encryption.words.clone()));
        lines.extend(encryption.warning.map(|warning| ("warning", warning.to_owned())));
    }
    lines.extend(description.writable.as_ref().err().map(|reason| ("read-only", reason.clone())));
    lines.extend(description.properties.iter().map(|(key, value)| (*key, value.clone())));
    // What comes from the image is shown without what a terminal would obey.
    let clean = |text: &str| text.replace(char::is_control, "?");
    lines.iter().map(|(key, value)| format!("{:<18} {}\n", format!("{key}:"), clean(value))).collect()
}

/// `check`, and with `repair` that.
///
/// Exit codes: of a check 0 clean, 1 could not check, 2 corrupt, 3 only leaks; of a repair 0 if nothing is wrong any more, else 1.
///
/// # Errors
/// It could not be done.
pub fn check(name: &ImageName, repair: Option<Repair>, gate: &Gate, json: bool) -> Result<u8, Failure> {
    let found = match examine(name, repair, gate) {
        Ok(found) => found,
        // So damaged that its description cannot be read: that is what was looked for.
        Err(failure) if failure.kind == Some(ErrorKind::Corrupt) => {
            let mut found = Findings::default();
            found.corruption(failure.message);
            found
        }
        Err(failure) => return Err(failure),
    };
    let is_open = found.corruptions_total + found.leaks_total > found.repaired_total;
    let code = match repair {
        Some(_) => u8::from(is_open),
        None if found.corruptions_total > 0 => 2,
        None if found.leaks_total > 0 => 3,
        None => 0,
    };
    let value = json!({
        "image": name.to_string(),
        "clean": !is_open,
        "corruptions": found.corruptions,
        "corruptions_total": found.corruptions_total,
        "leaks": found.leaks,
        "leaks_total": found.leaks_total,
        "remarks": found.remarks,
        "repaired_total": found.repaired_total,
        "allocated_bytes": found.allocated_bytes,
        "end": found.end,
    });
    output::print(json, &value, &findings_text(name, &found, is_open))?;
    Ok(code)
}

fn examine(name: &ImageName, repair: Option<Repair>, gate: &Gate) -> Result<Findings, Failure> {
    let want = if repair.is_some() { Want::Write } else { Want::Read };
    let image = Opened::open(name, want, gate)?;
    let mut remarks = Vec::new();
    let below_size = match &image.description.backing {
        None => None,
        Some(_) => match Chain::open_below(&image, gate) {
            Ok(below) => Some(below.top().description.size),
            Err(failure) => {
                remarks.push(format!("what is below could not be opened: {failure}"));
                Some(image.description.size)
            }
        },
    };
    let format = name.format;
    let files: Vec<_> = image.files.iter().collect();
    let mut found = engine::run(&files, move |files, budget| async move {
        let layer = layers::LayerFiles { format, files, snapshot: None, key: None };
        format.check(layer.how(repair.is_some(), below_size, &budget), repair).await
    })?;
    found.remarks.extend(remarks);
    Ok(found)
}

fn findings_text(name: &ImageName, found: &Findings, is_open: bool) -> String {
    let mut text = String::new();
    let mut list = |label: &str, lines: &[String], total: u64| {
        lines.iter().for_each(|line| text.push_str(&format!("{label}: {line}\n")));
        if total > lines.len() as u64 {
            text.push_str(&format!("{label}: {total} in all\n"));
        }
    };
    list("corrupt", &found.corruptions, found.corruptions_total);
    list("leak", &found.leaks, found.leaks_total);
    list("remark", &found.remarks, 0);
    if found.repaired_total > 0 {
        text.push_str(&format!("{} repaired\n", found.repaired_total));
    }
    let verdict = match (is_open, found.corruptions_total) {
        (false, _) => "clean".to_owned(),
        (true, 0) => format!("{} leaks, nothing corrupt", found.leaks_total),
        (true, corruptions) => format!("{corruptions} corruptions, {} leaks", found.leaks_total),
    };
    text.push_str(&format!("{name}: {verdict}; {} in use\n", output::bytes(found.allocated_bytes)));
    text
}

/// `map`.
///
/// # Errors
/// The image cannot be read, or standard output cannot be written.
pub fn map(
    name: &ImageName,
    start: u64,
    length: Option<u64>,
    gate: &Gate,
    json: bool,
) -> Result<u8, Failure> {
    let chain = Chain::open(name, gate)?;
    let size = chain.top().disk_size()?;
    if start > size {
        return Err(Failure::usage(format!("--start {start}: {name} has {size} bytes")));
    }
    let shape = chain.shape();
    let paths: Vec<Vec<String>> = chain
        .images
        .iter()
        .map(|image| image.files.iter().map(|file| file.path.display().to_string()).collect())
        .collect();
    output::write(if json { "[" } else { "START            LENGTH           DEPTH STATE  WHERE\n" })?;
    let first = RefCell::new(true);
    engine::run_blocking(&chain.files(), |files, budget| async move {
        let volume = layers::open(&shape.take(&mut files.into_iter()), false, &budget).await?;
        let range = start..start.saturating_add(length.unwrap_or(u64::MAX)).min(volume.size());
        let mut show = |span: &Span| {
            let line = if json { span_json(span, &paths) } else { span_text(span, &paths) };
            let between = if json && !first.replace(false) { ",\n" } else { "" };
            let written = output::write(&format!("{between}{line}"));
            written.map_err(|failure| Error::invalid(failure.message))
        };
        formats::tools::map::map(&volume, range, &mut show).await
    })?;
    output::write(if json { "]\n" } else { "" })?;
    Ok(0)
}

/// Which file and where, if a span is in one.
fn place<'a>(span: &Span, paths: &'a [Vec<String>]) -> Option<(&'a str, u64)> {
    let (State::Data { file, offset } | State::Hole { file, offset }) = span.state else { return None };
    let path = paths.get(usize::from(file.layer))?.get(usize::from(file.file.0))?;
    Some((path, offset))
}

/// With the names of `qemu-img map`, so that its readers can read this.
fn span_json(span: &Span, paths: &[Vec<String>]) -> String {
    let mut value = json!({
        "start": span.start,
        "length": span.len,
        "depth": span.layer,
        "present": span.state != State::Absent,
        "zero": !span.is_data(),
        "data": span.is_data(),
    });
    if let Some((path, offset)) = place(span, paths) {
        value["offset"] = json!(offset);
        value["file"] = json!(path);
    }
    value.to_string()
}

fn span_text(span: &Span, paths: &[Vec<String>]) -> String {
    let state = match span.state {
        State::Data { .. } => "data",
        State::Encoded => "coded",
        State::Hole { .. } => "hole",
        State::Zero { .. } => "zero",
        State::Absent => "none",
    };
    let place = place(span, paths).map_or(String::new(), |(path, offset)| format!("{offset:#x} {path}"));
    format!("{:<#16x} {:<#16x} {:<5} {state:<6} {place}\n", span.start, span.len, span.layer)
}

/// `compare`.
///
/// # Errors
/// It could not be done.
pub fn compare(
    one: &ImageName,
    two: &ImageName,
    strict: bool,
    gate: &Gate,
    json: bool,
) -> Result<u8, Failure> {
    let (first, second) = (Chain::open(one, gate)?, Chain::open(two, gate)?);
    let (first_shape, second_shape) = (first.shape(), second.shape());
    let mut files = first.files();
    files.extend(second.files());
    let (difference, sizes) = engine::run(&files, move |files, budget| async move {
        let mut files = files.into_iter();
        let first = layers::open(&first_shape.take(&mut files), false, &budget).await?;
        let second = layers::open(&second_shape.take(&mut files), false, &budget).await?;
        let bar = Bar::new("compare");
        let difference = formats::tools::compare::compare(&first, &second, strict, &bar).await?;
        Ok((difference, (first.size(), second.size())))
    })?;
    let text = match difference {
        None if sizes.0 == sizes.1 => "the same\n".to_owned(),
        None => format!("the same, and behind the smaller one ({} bytes) zeroes\n", sizes.0.min(sizes.1)),
        Some(Difference::Byte(offset)) => format!("different at byte {offset}\n"),
        Some(Difference::Size) => format!("different in size: {} and {} bytes\n", sizes.0, sizes.1),
    };
    let offset = match difference {
        Some(Difference::Byte(offset)) => Some(offset),
        _ => None,
    };
    let value =
        json!({ "same": difference.is_none(), "first_difference": offset, "sizes": [sizes.0, sizes.1] });
    output::print(json, &value, &text)?;
    Ok(u8::from(difference.is_some()))
}

/// `measure`.
///
/// # Errors
/// The source cannot be read, or the new format cannot tell.
pub fn measure(args: &MeasureArgs, gate: &Gate, json: bool) -> Result<u8, Failure> {
    let format = format(&args.to).map_err(Failure::usage)?;
    let create = Create { size: args.size, backing: None, options: args.options.clone(), key: None };
    let source = args.source.as_ref().map(|source| Chain::open(source, gate)).transpose()?;
    let shape = source.as_ref().map(Chain::shape);
    let files = source.as_ref().map(Chain::files).unwrap_or_default();
    let measured = engine::run_blocking(&files, |files, budget| async move {
        let volume = match shape {
            Some(shape) => Some(layers::open(&shape.take(&mut files.into_iter()), false, &budget).await?),
            None => None,
        };
        formats::tools::measure::measure(format, &create, volume.as_ref()).await
    })?;
    let text = format!(
        "required:        {}\nfully allocated: {}\n",
        output::bytes(measured.required),
        output::bytes(measured.full)
    );
    let value = json!({ "required": measured.required, "fully_allocated": measured.full });
    output::print(json, &value, &text)?;
    Ok(0)
}
