// process.h: runs the built programs as a user does: arguments in; exit status, stdout and stderr out.
//
// Build: header only, POSIX.
// Not:   no shell and no time limit; a test that hangs is stopped by whoever runs the tests.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace process {

inline std::string bin_dir() { // where the programs are
    const char *dir = getenv("BNB_BIN_DIR");
    return dir ? dir : ".";
}

struct Result {
    int status = -1; // exit status, or 128 + the signal that ended it
    std::string out, err;
};

struct How {
    std::string input;         // of stdin
    long interrupt_after = -1; // send SIGINT once stdout has this many bytes
    long max_file_bytes = -1;  // limit on the size of files it writes
    std::string stdout_to;     // a file instead of a pipe
    int stderr_fd = -1;        // instead of a file that becomes Result::err
    std::string directory;     // to run in
};

inline std::string read_all(FILE *f) {
    std::string s;
    char buffer[4096];
    rewind(f);
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;) s.append(buffer, n);
    return s;
}

inline void become(const std::vector<std::string> &args, const How &how, int in, int out, int err) {
    if (!how.stdout_to.empty()) out = open(how.stdout_to.c_str(), O_WRONLY);
    if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0) _exit(125);
    if (how.max_file_bytes >= 0) {
        const struct rlimit limit = {rlim_t(how.max_file_bytes), rlim_t(how.max_file_bytes)};
        signal(SIGXFSZ, SIG_IGN); // writing then fails with EFBIG, much as on a full disk
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    if (!how.directory.empty() && chdir(how.directory.c_str()) < 0) _exit(125);
    std::vector<char *> argv;
    for (const std::string &a : args) argv.push_back(const_cast<char *>(a.c_str()));
    argv.push_back(nullptr);
    execvp(argv[0], argv.data());
    _exit(126);
}

// args[0] is looked up in PATH unless it has a slash.
inline Result run_command(const std::vector<std::string> &args, const How &how = {}) {
    Result r;
    FILE *in = tmpfile(), *err = tmpfile();
    int pipe_fds[2];
    if (!in || !err || pipe(pipe_fds) < 0) return r;
    fwrite(how.input.data(), 1, how.input.size(), in);
    rewind(in);
    const pid_t pid = fork();
    if (pid == 0) {
        close(pipe_fds[0]);
        become(args, how, fileno(in), pipe_fds[1], how.stderr_fd >= 0 ? how.stderr_fd : fileno(err));
    }
    close(pipe_fds[1]);
    bool interrupted = false;
    char buffer[4096];
    for (ssize_t n; (n = read(pipe_fds[0], buffer, sizeof buffer)) > 0;) {
        r.out.append(buffer, size_t(n));
        if (how.interrupt_after >= 0 && !interrupted && long(r.out.size()) >= how.interrupt_after) {
            kill(pid, SIGINT);
            interrupted = true;
        }
    }
    close(pipe_fds[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    r.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    r.err = read_all(err);
    fclose(in);
    fclose(err);
    return r;
}

// One of the programs that were built: run({"main", "--help"}).
inline Result run(std::vector<std::string> args, const How &how = {}) {
    args[0] = bin_dir() + "/" + args[0];
    return run_command(args, how);
}

// A new directory that is removed with everything in it.
class TempDir {
public:
    TempDir() {
        char name[] = "/tmp/bnb-test-XXXXXX";
        if (const char *made = mkdtemp(name)) path_ = made;
    }
    ~TempDir() {
        if (!path_.empty()) run_command({"rm", "-rf", path_});
    }
    TempDir(const TempDir &) = delete;
    std::string operator/(const std::string &name) const { return path_ + "/" + name; }
    const std::string &path() const { return path_; }

private:
    std::string path_;
};

inline std::string read_file(const std::string &path) {
    std::ifstream f(path, std::ios::binary);
    std::ostringstream s;
    s << f.rdbuf();
    return s.str();
}

inline void write_file(const std::string &path, const std::string &bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
}
inline bool exists(const std::string &path) { return access(path.c_str(), F_OK) == 0; }

} // namespace process
