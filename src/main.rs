//! Hidden subcommands for the tests of this branch. REPLACE ON MERGE with the real command line.

fn main() -> std::io::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some(lanlet::tap::HELPER_SUBCOMMAND) => lanlet::tap::helper::run_on_stdin(),
        _ => Err(std::io::ErrorKind::Unsupported.into()),
    }
}
