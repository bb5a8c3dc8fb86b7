//! The `lanlet` program: see [`lanlet::cli`].

fn main() -> std::process::ExitCode {
    lanlet::cli::main()
}
