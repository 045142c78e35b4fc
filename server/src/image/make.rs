//! New images: `create`, `snapshot`, and what `convert` and `dd` need to make one.

use formats::driver::{Create, Snapshot, SnapshotChange};
use formats::file::ImageFile;
use formats::metadata::Budget;
use formats::tools::layers::{self, BUDGET_BYTES, LayerFiles};
use formats::tools::snapshot::is_empty;
use serde_json::json;

use super::args::{CreateArgs, Internal, NewArgs, SnapshotArgs};
use super::chain::{Chain, Gate, Opened, read_key};
use super::failure::Failure;
use super::file::{OpenFile, Want};
use super::name::ImageName;
use super::target::NewFile;
use super::{engine, output};

/// The files of a new image.
#[derive(Debug)]
pub struct NewImage {
    /// Its file, then its data files, on their way.
    new: Vec<NewFile>,
    /// A device, which is there already.
    device: Option<OpenFile>,
}

impl NewImage {
    /// Makes files for an image that is to be made as `create` says.
    ///
    /// # Errors
    /// They exist, or cannot be made; the options make no sense; the log of a dead daemon has writes for what they replace, or
    /// would be taken for one of theirs.
    pub fn make(name: &ImageName, create: &Create, force: bool, gate: &Gate) -> Result<NewImage, Failure> {
        if name.snapshot.is_some() {
            return Err(Failure::usage(format!("{name} is to be made: it has no snapshot yet")));
        }
        let data_files = name.format.data_files(create)?;
        let device = match OpenFile::open(&name.path, Want::Look) {
            Ok(file) if file.is_device() => Some(OpenFile::open(&name.path, Want::Write)?),
            _ => None,
        };
        let mut new = Vec::new();
        if device.is_none() {
            new.push(NewFile::make(&name.path, force)?);
        }
        for path in data_files {
            new.push(NewFile::make(&name.folder().join(path), force)?);
        }
        let mut made = NewImage { new, device };
        for new in &mut made.new {
            new.replaced().map_or(Ok(()), |replaced| gate.refuse_live(name, replaced))?;
            gate.refuse_live_new(name, &new.file)?;
            new.file.buffered = name.buffered;
        }
        if let Some(device) = &mut made.device {
            gate.refuse_live(name, device)?;
            device.buffered = name.buffered;
        }
        Ok(made)
    }

    /// In the order of a driver.
    pub fn files(&self) -> Vec<&OpenFile> {
        self.device.iter().chain(self.new.iter().map(|new| &new.file)).collect()
    }

    /// The image is complete and flushed: gives the files their names, the one that names the others last.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn publish(mut self) -> Result<(), Failure> {
        while let Some(new) = self.new.pop() {
            new.publish()?;
        }
        Ok(())
    }
}

/// `create`.
///
/// # Errors
/// See the module; nothing has been made then.
pub fn create(args: &CreateArgs, gate: &Gate, json: bool) -> Result<u8, Failure> {
    let parent = args.parent.as_ref().map(|parent| Chain::open(parent, gate)).transpose()?;
    if args.size.is_none() && parent.is_none() {
        return Err(Failure::usage(format!("{} needs a size or a --parent to take it from", args.image)));
    }
    let parent = parent.as_ref().map(Chain::top);
    make_over(&args.image, args.size, parent, &args.new, (gate, json))
}

/// Makes an empty image, over `parent` if there is one, and says so.
fn make_over(
    image: &ImageName,
    size: Option<u64>,
    parent: Option<&Opened>,
    new: &NewArgs,
    (gate, json): (&Gate, bool),
) -> Result<u8, Failure> {
    let backing = parent.map(|parent| parent.link_from(image)).transpose()?;
    let key = key_of_new(image)?;
    let create = Create { size, backing, options: new.options.clone(), key };
    let files = NewImage::make(image, &create, new.force, gate)?;
    let format = image.format;
    let below = create.backing.as_ref().map(|(_, size)| *size);
    let (size, encrypted) = engine::run_blocking(&files.files(), |files, budget| async move {
        let layer = make(format, &files, &create).await?;
        let encrypted = layer.key.is_some();
        let driver = format.open(layer.how(false, below, &budget)).await?;
        Ok((driver.size(), encrypted))
    })?;
    files.publish()?;
    if !encrypted && parent.is_some_and(|parent| parent.description.encryption.is_some()) {
        eprintln!(
            "blktapd image: {image} is not encrypted and its parent is: what is written from now on can be read by everybody who has the \
             file (-o encrypt.format=luks and a key-file= make an encrypted one)"
        );
    }
    let parent = parent.map(|parent| parent.name.to_string());
    let over = parent.as_ref().map_or(String::new(), |parent| format!(" over {parent}"));
    let text = format!("{image}: {}{over}\n", output::bytes(size));
    let value = json!({ "image": image.to_string(), "size": size, "parent": parent });
    output::print(json, &value, &text)?;
    Ok(0)
}

/// Makes an image in its files.
///
/// # Errors
/// Those of the format.
pub async fn make(
    format: &'static dyn formats::driver::Format,
    files: &[std::rc::Rc<dyn ImageFile>],
    create: &Create,
) -> Result<LayerFiles, formats::error::Error> {
    let Some((file, data_files)) = files.split_first() else {
        return Err(formats::error::Error::invalid("an image needs its file"));
    };
    format.create(file.clone(), data_files.to_vec(), create).await?;
    let key = match &create.key {
        None => None,
        Some(_) if format.describe(file.clone()).await?.encryption.is_none() => {
            return Err(formats::error::Error::invalid(
                "a key was given for an image that would not be encrypted: add -o encrypt.format=luks, or take the key away",
            ));
        }
        Some(passphrase) => Some(format.unlock(file.clone(), passphrase).await?),
    };
    Ok(LayerFiles { format, files: files.to_vec(), snapshot: None, key })
}

/// The passphrase for an image that is to be made.
///
/// # Errors
/// It cannot be read.
pub fn key_of_new(name: &ImageName) -> Result<Option<formats::crypt::Secret>, Failure> {
    name.keys.of(0).map(read_key).transpose()
}

/// `snapshot`.
///
/// # Errors
/// See the module; nothing has been made then.
pub fn snapshot(args: &SnapshotArgs, gate: &Gate, json: bool) -> Result<u8, Failure> {
    if let Some(action) = args.internal {
        return internal(action, &args.first, args.second.as_deref(), gate, json);
    }
    let named = |text: &str| text.parse::<ImageName>().map_err(Failure::usage);
    let parent = match args.raw_parent {
        true => {
            let path = std::path::absolute(&args.first).map_err(|error| Failure::usage(error.to_string()))?;
            let mut parent = ImageName::plain(super::name::format("raw").map_err(Failure::usage)?, path);
            parent.typed_absolute = args.first.starts_with('/');
            parent
        }
        false => named(&args.first)?,
    };
    let Some(second) = &args.second else {
        return Err(Failure::usage(format!("which image shall be made over {parent}? Name it behind it")));
    };
    let image = named(second)?;
    let mut chain = Chain::open(&parent, gate)?;
    if !args.empty {
        skip_empty(&mut chain, args.size)?;
    }
    let depth = chain.images.len() + 1;
    if depth > args.depth_limit as usize {
        return Err(Failure::new(format!(
            "{image} would be number {depth} of its chain, and {} are allowed: coalesce some first, or raise --depth-limit",
            args.depth_limit
        )));
    }
    make_over(&image, args.size, Some(chain.top()), &args.new, (gate, json))
}

/// Takes images off the chain that have nothing of their own and cut nothing off: a new disk of `size` bytes (by itself that of its
/// parent) reads the same without them.
fn skip_empty(chain: &mut Chain, size: Option<u64>) -> Result<(), Failure> {
    while let [top, below, ..] = &chain.images[..] {
        // Where the top ends before the layer below does, a larger disk reads zeroes over it.
        let (top_size, below_size) = (top.description.size, below.description.size);
        let reads_same = match size {
            Some(size) => size <= top_size || top_size >= below_size,
            None => top_size == below_size,
        };
        if !reads_same || top.name.snapshot.is_some() {
            return Ok(());
        }
        let (format, below_size, key) = (top.name.format, chain.below_size(), top.key.clone());
        let empty =
            engine::run_blocking(&top.files.iter().collect::<Vec<_>>(), |files, budget| async move {
                let layer = LayerFiles { format, files, snapshot: None, key };
                is_empty(&layers::open_alone(&layer, false, below_size, &budget).await?).await
            })?;
        if !empty {
            return Ok(());
        }
        eprintln!(
            "blktapd image: {} has nothing of its own: its parent is taken (--empty to keep it)",
            top.name
        );
        chain.images.remove(0);
    }
    Ok(())
}

/// `snapshot --internal`.
fn internal(
    action: Internal,
    first: &str,
    second: Option<&str>,
    gate: &Gate,
    json: bool,
) -> Result<u8, Failure> {
    let (snapshot, image) = match (action, second) {
        (Internal::List, None) => ("", first),
        (Internal::List, Some(_)) => {
            return Err(Failure::usage("--internal list takes an image and nothing else"));
        }
        (_, Some(image)) => (first, image),
        (_, None) => return Err(Failure::usage("name the snapshot, then the image: NAME TYPE:PATH")),
    };
    let image: ImageName = image.parse().map_err(Failure::usage)?;
    let change = match action {
        Internal::List => {
            let opened = Opened::open(&image, Want::Read, gate)?;
            let file = opened.files[0].blocking()?;
            let found = futures_lite::future::block_on(image.format.snapshots(file))?;
            output::print(json, &list_json(&found), &list_text(&found))?;
            return Ok(0);
        }
        Internal::Create => SnapshotChange::Create(snapshot.to_owned()),
        Internal::Apply => SnapshotChange::Apply(snapshot.to_owned()),
        Internal::Delete => SnapshotChange::Delete(snapshot.to_owned()),
    };
    let chain = Chain::open_for(&image, &[Want::Write], gate)?;
    let top = chain.top();
    let below_size = chain.below_size();
    let files = top.files.iter().map(|file| file.blocking().map(|file| file as std::rc::Rc<dyn ImageFile>));
    let layer = LayerFiles {
        format: image.format,
        files: files.collect::<Result<_, _>>()?,
        snapshot: None,
        key: None,
    };
    let open = layer.how(true, below_size, &Budget::new(BUDGET_BYTES));
    futures_lite::future::block_on(image.format.change_snapshots(open, &change))?;
    let done = match action {
        Internal::List => "listed",
        Internal::Create => "created",
        Internal::Apply => "applied",
        Internal::Delete => "deleted",
    };
    let value = json!({ "image": image.to_string(), "snapshot": snapshot, "done": done });
    output::print(json, &value, &format!("{image}: snapshot {snapshot} {done}\n"))?;
    Ok(0)
}

fn list_json(snapshots: &[Snapshot]) -> serde_json::Value {
    snapshots
        .iter()
        .map(|one| {
            json!({ "id": one.id, "name": one.name, "size": one.size, "created": one.created, "machine_bytes": one.machine_bytes })
        })
        .collect()
}

fn list_text(snapshots: &[Snapshot]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header([
        "ID",
        "NAME",
        "SIZE",
        "CREATED",
        "MACHINE STATE",
    ]);
    for one in snapshots {
        let size = one.size.map_or("not noted".to_owned(), |size| size.to_string());
        table.add_row([&one.id, &one.name, &size, &one.created.to_string(), &one.machine_bytes.to_string()]);
    }
    if snapshots.is_empty() { String::new() } else { format!("{table}\n") }
}
