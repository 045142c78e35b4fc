//! Goal: the grammar takes what its documentation says, refuses the rest at the right place with the right kind, and
//! never panics. Method: tables of known answers; round trips and arbitrary input by property tests.

use super::*;
use proptest::prelude::*;

fn parsed(text: &str) -> ImageSpec {
    text.parse().unwrap_or_else(|problem| panic!("{text}: {problem}"))
}

fn refused(text: &str) -> SpecError {
    text.parse::<ImageSpec>().expect_err(text)
}

#[test]
fn raw() {
    let plain = parsed("raw:/srv/disk.img");
    assert_eq!((plain.image_type, plain.path.as_str()), (ImageType::Raw, "/srv/disk.img"));
    assert_eq!(parsed("aio:/srv/disk.img"), plain);
    assert_eq!(parsed("aio:/srv/disk.img").to_string(), "raw:/srv/disk.img");
    let target = parsed("raw:/dev/disk/by-id/a:b?sector=4096&cache=writethrough").target().unwrap();
    let options = RawOptions { cache: CacheMode::Writethrough, sector: Some(4096) };
    assert_eq!(target, Target::Raw { path: "/dev/disk/by-id/a:b".into(), options });
}

#[test]
fn encoded_characters_are_decoded_and_encoded_again() {
    let spec = parsed("raw:/a%2Cb%3Fc d&e=f#é%25?cache=none");
    assert_eq!(spec.path, "/a,b?c d&e=f#é%");
    assert_eq!(spec.to_string(), "raw:/a%2Cb%3Fc%20d%26e%3Df%23%C3%A9%25?cache=none");
}

#[test]
fn ram_and_null() {
    let Target::Ram { name, options } = parsed("ram:r1?size=1G&init=/a%26b&huge=2M").target().unwrap() else {
        panic!("not ram")
    };
    assert_eq!(name, "r1");
    assert_eq!(options, RamOptions { size: 1 << 30, init: Some("/a&b".into()), huge: Some(2 << 20) });
    let same = parsed("ram:r1?size=1024M").target().unwrap();
    assert_eq!(same, parsed("ram:r1?size=1GiB").target().unwrap());
    let null = parsed("null:?size=512").target().unwrap();
    assert_eq!(null, Target::Null { options: NullOptions { size: 512 } });
}

#[test]
fn refusals_name_kind_and_place() {
    use SpecErrorKind::*;
    let long = format!("raw:/{}", "a".repeat(SPEC_MAX_BYTES));
    let deep = format!("raw:/{}", "a".repeat(PATH_MAX_BYTES));
    let table: &[(&str, SpecErrorKind, Option<usize>)] = &[
        ("", MissingType, Some(0)),
        ("/srv/disk.img", MissingType, Some(0)),
        (":/a", MissingType, Some(0)),
        ("/a:b", MissingType, Some(0)),
        ("foo:/a", UnknownType, Some(0)),
        ("RAW:/a", UnknownType, Some(0)),
        ("cow:raw:/a", UnknownType, Some(0)),
        ("vhdx:/a", NotBuilt, Some(0)),
        ("vdi:/a", NotBuilt, Some(0)),
        ("qed:/a", NotBuilt, Some(0)),
        ("parallels:/a", NotBuilt, Some(0)),
        ("vmdk:/a", NotBuilt, Some(0)),
        ("raw:/a,b", Character, Some(6)),
        ("raw:/a\nb", Character, Some(6)),
        ("raw:/a?cache=a,b", Character, Some(14)),
        ("raw:/a%2", Escape, Some(6)),
        ("raw:/a%+1", Escape, Some(6)),
        ("raw:/é%zz", Escape, Some(7)),
        ("raw:/%FF", Escape, Some(4)),
        ("raw:/a%00b", Path, Some(4)),
        ("raw:/a%0Ab", Path, Some(4)),
        ("raw:", Path, Some(4)),
        ("raw:disk.img", Path, Some(4)),
        ("aio:./disk.img", Path, Some(4)),
        ("raw:/a?", OptionSyntax, Some(7)),
        ("raw:/a?cache", OptionSyntax, Some(7)),
        ("raw:/a?=x", OptionSyntax, Some(7)),
        ("raw:/a?cache=none&", OptionSyntax, Some(18)),
        ("raw:/a?size=1G", UnknownOption, Some(7)),
        ("raw:/a?cache=none&Sector=512", UnknownOption, Some(18)),
        ("raw:/a?cache=none&cache=none", DuplicateOption, Some(18)),
        ("raw:/a?cache=yes", OptionValue, Some(13)),
        ("raw:/a?sector=0512", OptionValue, Some(14)),
        ("ram:?size=1G", Name, Some(4)),
        ("ram:a/b?size=1G", Name, Some(4)),
        ("ram:a", MissingOption, None),
        ("ram:a?size=0", OptionValue, Some(11)),
        ("ram:a?size=1000", OptionValue, Some(11)),
        ("ram:a?size=8E", OptionValue, Some(11)),
        ("ram:a?size=much", OptionValue, Some(11)),
        ("ram:a?size=1G&huge=4M", OptionValue, Some(19)),
        ("ram:a?size=1G&init=x", Path, Some(19)),
        ("null:", MissingOption, None),
        ("null:/a?size=1G", Path, Some(5)),
        (&long, TooLong, Some(SPEC_MAX_BYTES)),
        (&deep, Path, Some(4)),
    ];
    for (text, kind, offset) in table {
        let problem = refused(text);
        assert_eq!((problem.kind, problem.offset), (*kind, *offset), "{text}: {problem}");
        assert!(problem.message.len() < 400, "{text}: {problem}");
        assert!(!problem.message.chars().any(char::is_control), "{text}: {problem}");
    }
}

#[test]
fn messages_say_what_to_do() {
    for (text, parts) in [
        (
            "foo:/a",
            ["\"foo\"", "raw (or aio), vhd, qcow2, qcow, luks, ram and null", "no decorators", "offset 0"],
        ),
        ("vmdk:/a", ["\"vmdk\"", "not built into this version", "raw (or aio)", "offset 0"]),
        ("raw:a.img", ["\"a.img\"", "relative", "starting with /", "offset 4"]),
        ("raw:/a?foo=1", ["raw has no option", "\"foo\"", "cache, sector", "offset 7"]),
        ("raw:/a?cache=fast", ["option cache", "\"fast\"", "none, writeback or writethrough", "offset 13"]),
        ("raw:/a,b", ["comma", "%2C", "xl", "offset 6"]),
    ] {
        let message = refused(text).to_string();
        for part in parts {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}

#[test]
fn relative_paths_are_joined_for_the_command_line() {
    let from = |text| ImageSpec::parse_relative_to(text, Path::new("/home/me")).map(|spec| spec.to_string());
    assert_eq!(from("raw:disk.img").unwrap(), "raw:/home/me/disk.img");
    assert_eq!(from("raw:./a:b").unwrap(), "raw:/home/me/a:b");
    assert_eq!(from("raw:/abs").unwrap(), "raw:/abs");
    assert_eq!(from("ram:x?size=1G&init=seed").unwrap(), "ram:x?init=/home/me/seed&size=1G");
    assert_eq!(from("raw:").unwrap_err().kind, SpecErrorKind::Path);
    assert_eq!(from("ram:x?size=1G&init=").unwrap_err().kind, SpecErrorKind::Path);
    let no_base = ImageSpec::parse_relative_to("raw:a", Path::new("b")).unwrap_err();
    assert_eq!(no_base.kind, SpecErrorKind::Path);
}

#[test]
fn json_is_the_structured_form() {
    let spec = parsed("ram:r1?size=1G");
    let json = r#"{"type":"ram","path":"r1","options":{"size":"1G"}}"#;
    assert_eq!(serde_json::to_string(&spec).unwrap(), json);
    assert_eq!(serde_json::from_str::<ImageSpec>(json).unwrap(), spec);
    let alias: ImageSpec = serde_json::from_str(r#"{"type":"aio","path":"/a"}"#).unwrap();
    assert_eq!(alias, parsed("raw:/a"));
    let unknown = serde_json::from_str::<ImageSpec>(r#"{"type":"vmdk","path":"/a"}"#).unwrap_err();
    assert!(unknown.to_string().contains("not built into this version"), "{unknown}");
    assert!(serde_json::from_str::<ImageSpec>(r#"{"type":"raw","path":"/a","size":1}"#).is_err());
    let relative: ImageSpec = serde_json::from_str(r#"{"type":"raw","path":"a"}"#).unwrap();
    assert_eq!(relative.target().unwrap_err().offset, None);
}

#[test]
fn disk_names() {
    for good in ["d1", "a", "A-b_c.d", "0", &"x".repeat(NAME_MAX_BYTES)] {
        assert_eq!(check_disk_name(good), Ok(()), "{good}");
    }
    let long = "x".repeat(NAME_MAX_BYTES + 1);
    for bad in ["", ".", "..", "-a", ".a", "a/b", "a b", "a\0", "a\n", "ä", "a:b", "a,b", "a%20", &long] {
        assert_eq!(check_disk_name(bad).unwrap_err().kind, SpecErrorKind::Name, "{bad}");
    }
}

#[test]
fn socket_paths() {
    let of_length = |length: usize| PathBuf::from(format!("/{}", "s".repeat(length - 1)));
    assert_eq!(check_socket_path(&of_length(SOCKET_PATH_MAX_BYTES)), Ok(()));
    let problem = check_socket_path(&of_length(SOCKET_PATH_MAX_BYTES + 1)).unwrap_err();
    assert_eq!(problem.kind, SpecErrorKind::SocketPath);
    assert!(problem.message.contains("108 bytes"), "{problem}");
}

fn valid_spec() -> impl Strategy<Value = ImageSpec> {
    let options = |pairs: Vec<(&str, Option<String>)>| {
        pairs
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)))
            .collect::<BTreeMap<_, _>>()
    };
    let path = "/[^\\p{Cc}]{0,60}";
    let raw = (path, prop::option::of("none|writeback|writethrough"), prop::option::of("512|4096")).prop_map(
        move |(path, cache, sector)| ImageSpec {
            image_type: ImageType::Raw,
            path,
            options: options(vec![("cache", cache), ("sector", sector)]),
        },
    );
    let ram = ("[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", "[1-9][0-9]{0,3}[kMG]", prop::option::of(path)).prop_map(
        move |(path, size, init)| ImageSpec {
            image_type: ImageType::Ram,
            path,
            options: options(vec![("size", Some(size)), ("init", init)]),
        },
    );
    prop_oneof![raw, ram]
}

proptest! {
    #[test]
    fn parse_of_display_is_identity(spec in valid_spec()) {
        let text = spec.to_string();
        prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b','), "{}", text);
        prop_assert_eq!(text.parse::<ImageSpec>().unwrap(), spec);
    }

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,60}", name in any::<String>()) {
        let _ = text.parse::<ImageSpec>();
        let _ = ImageSpec::parse_relative_to(&text, Path::new("/"));
        let _ = check_disk_name(&name);
    }

    #[test]
    fn near_miss_text_is_stable(text in "(raw|aio|ram|null|vhd|x):[/a%2C,?&=:é\u{0}]{0,12}(\\?(size|cache|init|huge|sector)=[0-9GMk%a-f&=]{0,9}){0,2}") {
        if let Ok(spec) = text.parse::<ImageSpec>() {
            let canonical = spec.to_string();
            prop_assert_eq!(&canonical.parse::<ImageSpec>().unwrap(), &spec);
            prop_assert_eq!(spec.target(), canonical.parse::<ImageSpec>().unwrap().target());
        }
    }
}
