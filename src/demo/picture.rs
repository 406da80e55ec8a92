//! The page list as a picture: one cell a run of entries, coloured by what the pages are and marked by how DMA reaches
//! them. Colours vanish when the output is not a terminal (anstream); the marks stay.

use anstyle::{AnsiColor, Color, Style};
use hw_model::hca::{Backing, Path};
use mr::{MapEntry, MapRun};
use std::fmt::Write;

/// Cells in a line.
const WIDTH: u64 = 64;
/// Lines of a picture.
const HEIGHT: u64 = 8;

fn letter(backing: Backing) -> char {
    match backing {
        Backing::Anonymous => 'a',
        Backing::TransparentHuge => 'T',
        Backing::Hugetlb => 'H',
        Backing::File => 'f',
        Backing::Shared => 's',
        Backing::Zero => 'z',
        Backing::DmabufSystem => 'd',
        Backing::DmabufPeer => 'P',
        Backing::DevicePrivate => 'v',
        Backing::DeviceCoherent => 'c',
        Backing::EncryptedPrivate => 'e',
        Backing::EncryptedShared => 'x',
    }
}

fn colour(backing: Backing) -> AnsiColor {
    match backing {
        Backing::Anonymous => AnsiColor::Blue,
        Backing::TransparentHuge => AnsiColor::Cyan,
        Backing::Hugetlb => AnsiColor::BrightCyan,
        Backing::File => AnsiColor::Yellow,
        Backing::Shared => AnsiColor::Green,
        Backing::Zero => AnsiColor::BrightBlack,
        Backing::DmabufSystem => AnsiColor::Magenta,
        Backing::DmabufPeer => AnsiColor::Red,
        Backing::DevicePrivate | Backing::DeviceCoherent => AnsiColor::BrightRed,
        Backing::EncryptedPrivate | Backing::EncryptedShared => AnsiColor::BrightYellow,
    }
}

/// A peer's page is underlined when the switch routes it by bus address: it has no IOVA slot.
fn style(entry: MapEntry) -> Style {
    let style = Style::new().fg_color(Some(Color::Ansi(colour(entry.backing))));
    if entry.path == Path::BusAddress { style.underline() } else { style }
}

/// Draws the list: each cell stands for an equal share of the pages and shows what most of them are, in lower case as
/// the legend says, with a `.` where most are absent.
pub fn draw(map: &[MapRun], pages: u64) -> String {
    let cells = (WIDTH * HEIGHT).min(pages);
    let mut text = String::new();
    let mut run = 0;
    for cell in 0..cells {
        let (first, end) = (cell * pages / cells, (cell + 1) * pages / cells);
        while map.get(run).is_some_and(|r| r.first + r.pages <= first) {
            run += 1;
        }
        match majority(&map[run..], first, end) {
            Some(entry) => {
                let style = style(entry);
                let _ = write!(text, "{style}{}{style:#}", letter(entry.backing));
            }
            None => text.push('.'),
        }
        if cell % WIDTH == WIDTH - 1 || cell == cells - 1 {
            text.push('\n');
        }
    }
    text
}

/// What most pages of `[first, end)` are.
fn majority(map: &[MapRun], first: u64, end: u64) -> Option<MapEntry> {
    let mut tally: Vec<(Option<MapEntry>, u64)> = Vec::new();
    for run in map.iter().take_while(|run| run.first < end) {
        let pages = (run.first + run.pages).min(end).saturating_sub(run.first.max(first));
        let entry = run.entry.map(|entry| MapEntry { writable: true, ..entry });
        match tally.iter_mut().find(|(known, _)| *known == entry) {
            Some((_, count)) => *count += pages,
            None => tally.push((entry, pages)),
        }
    }
    tally.into_iter().max_by_key(|(_, count)| *count)?.0
}

/// One line that explains the cells of both pictures.
pub fn legend(maps: [&[MapRun]; 2], pages: u64) -> String {
    let mut seen: Vec<MapEntry> = Vec::new();
    for entry in maps.iter().flat_map(|map| map.iter()).filter_map(|run| run.entry) {
        let entry = MapEntry { writable: true, ..entry };
        if !seen.contains(&entry) {
            seen.push(entry);
        }
    }
    seen.sort();
    let cells = (WIDTH * HEIGHT).min(pages).max(1);
    let mut text = format!("one cell is {} pages;  . absent", pages.div_ceil(cells));
    for entry in seen {
        let style = style(entry);
        let (mark, kind, path) = (letter(entry.backing), entry.backing.name(), entry.path.name());
        let _ = write!(text, "  {style}{mark}{style:#} {kind} by {path}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64, backing: Option<Backing>) -> MapRun {
        let entry = backing.map(|backing| MapEntry { backing, path: Path::Iova, writable: true });
        MapRun { first, pages, entry }
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn a_small_list_has_a_cell_a_page() {
        let map = [run(0, 2, Some(Backing::Anonymous)), run(2, 1, None), run(3, 1, Some(Backing::Shared))];
        assert_eq!(plain(&draw(&map, 4)), "aa.s\n");
    }

    #[test]
    fn a_cell_shows_what_most_of_its_pages_are() {
        let pages = WIDTH * HEIGHT * 4;
        let map = [run(0, 3, Some(Backing::File)), run(3, 1, None), run(4, pages - 4, Some(Backing::Zero))];
        let picture = plain(&draw(&map, pages));
        assert!(picture.starts_with("fzzz"), "{picture}");
        assert_eq!(picture.lines().count() as u64, HEIGHT);
    }
}
