//! `lanlet man` and `lanlet completions`: made from the same table as `--help`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use super::{Cli, Failure, complete, print};

/// Print a man page
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet man | man -l -
  lanlet man run | man -l -
  lanlet man --dir ~/.local/share/man/man1")]
pub(super) struct ManArgs {
    /// The command to print the page of, like up or policy-set [default: lanlet itself]
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
    /// Write all pages, lanlet.1 and lanlet-COMMAND.1, into this directory
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    dir: Option<PathBuf>,
}

/// Print a shell's completions
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet completions bash > ~/.local/share/bash-completion/completions/lanlet
  lanlet completions fish > ~/.config/fish/completions/lanlet.fish
  lanlet completions zsh > ~/.zfunc/_lanlet")]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// The commands with a page, each with the name of its page.
fn pages() -> Vec<(String, clap::Command)> {
    let mut root = Cli::command();
    root.build();
    let mut pages = Vec::new();
    add_pages("lanlet".to_owned(), root, &mut pages);
    pages
}

/// A command's page, and those of the commands below it.
fn add_pages(name: String, command: clap::Command, pages: &mut Vec<(String, clap::Command)>) {
    let below: Vec<_> = command.get_subcommands().cloned().collect();
    pages.push((name.clone(), command));
    // 'help' has no page of its own: each page is that.
    let has_page = |command: &clap::Command| !command.is_hide_set() && command.get_name() != "help";
    for command in below.into_iter().filter(has_page) {
        add_pages(format!("{name}-{}", command.get_name()), command, pages);
    }
}

/// A page. The text after the help becomes sections of its own, unfilled: examples and tables.
fn render(page: clap::Command) -> Result<String, Failure> {
    let sections = page
        .get_after_long_help()
        .or(page.get_after_help())
        .map(ToString::to_string);
    let has_subcommands = page.get_subcommands().any(|command| !command.is_hide_set());
    let description = page.get_long_about().or(page.get_about());
    let description = description.map(ToString::to_string);
    let page = Man::new(page);
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    let mut rest = Vec::new();
    page.render_options_section(&mut rest)?;
    if has_subcommands {
        page.render_subcommands_section(&mut rest)?;
    }
    let said = |text: Vec<u8>| String::from_utf8_lossy(&text).into_owned();
    Ok(said(text)
        + ".SH DESCRIPTION\n"
        + &roff_text(&description.unwrap_or_default())
        + &said(rest)
        + &roff_sections(&sections.unwrap_or_default()))
}

/// Paragraphs, filled, with the lines between them that are indented left as they are: forms, tables.
fn roff_text(text: &str) -> String {
    let mut roff = String::new();
    let mut is_kept = false;
    for line in text.lines() {
        let keep = line.starts_with("  ");
        match (is_kept, keep) {
            (false, true) => roff.push_str(".nf\n"),
            (true, false) => roff.push_str(".fi\n"),
            _ => {}
        }
        is_kept = keep;
        roff.push_str(&match line.trim() {
            "" => ".PP\n".to_owned(),
            _ => roff_line(line),
        });
    }
    if is_kept { roff + ".fi\n" } else { roff }
}

/// A line as it is, whatever it begins with: a blank in front keeps a dot from being a request.
fn roff_line(line: &str) -> String {
    // What is to be copied is not made typography.
    let plain = [
        ('\\', "\\e"),
        ('-', "\\-"),
        ('\'', "\\(aq"),
        ('`', "\\(ga"),
        ('^', "\\(ha"),
        ('~', "\\(ti"),
    ];
    let line: String = line
        .chars()
        .map(|c| {
            let escaped = plain.iter().find(|(from, _)| *from == c);
            escaped.map_or_else(|| c.to_string(), |(_, to)| (*to).to_owned())
        })
        .collect();
    format!("\\&{line}\n")
}

/// Lines like `Examples:` head a section each.
fn roff_sections(text: &str) -> String {
    let mut roff = String::new();
    let mut is_open = false;
    for line in text.lines() {
        match line.strip_suffix(':').filter(|head| !head.starts_with(' ')) {
            Some(head) => {
                let close = if is_open { ".fi\n" } else { "" };
                roff.push_str(&format!("{close}.SH {}\n.nf\n", head.to_uppercase()));
                is_open = true;
            }
            None => roff.push_str(&roff_line(line)),
        }
    }
    if is_open { roff + ".fi\n" } else { roff }
}

pub(super) fn man(args: &ManArgs) -> Result<ExitCode, Failure> {
    if let Some(dir) = &args.dir {
        std::fs::create_dir_all(dir)
            .map_err(Failure::io(format!("cannot make {}", dir.display())))?;
        for (name, page) in pages() {
            let path = dir.join(format!("{name}.1"));
            std::fs::write(&path, render(page)?)
                .map_err(Failure::io(format!("cannot write {}", path.display())))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let wanted = args
        .command
        .as_ref()
        .map_or("lanlet".to_owned(), |name| format!("lanlet-{name}"));
    let page = pages().into_iter().find(|(name, _)| *name == wanted);
    let (_, page) =
        page.ok_or_else(|| Failure::Usage(format!("there is no command {wanted:?}")))?;
    print(&render(page)?)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<ExitCode, Failure> {
    let shell = args.shell.to_string();
    print(&complete::script(&shell)?)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_and_completion_builds() {
        let pages = pages();
        assert!(pages.len() > 8);
        for (name, page) in pages {
            let text = render(page).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert!(
                text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"),
                "{name}"
            );
            assert!(text.contains(".SH EXAMPLES"), "{name}");
            assert!(!text.contains("child-init"), "{name}");
            assert_eq!(
                text.matches("\n.nf\n").count(),
                text.matches("\n.fi\n").count(),
                "{name}"
            );
        }
    }
}
