package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// installCmd writes a systemd unit that runs this binary with the arguments after "--".
type installCmd struct {
	Args    []string `arg:"" optional:"" passthrough:"" help:"The command that the service runs: up [FLAGS] or join ADDRESS --token T [FLAGS] (default: up)."`
	Bin     string   `help:"Where to put the executables." default:"/usr/local/bin"`
	Unit    string   `help:"Unit file to write." default:"/etc/systemd/system/skein.service"`
	NoNow   bool     `help:"Write the files, but do not start the service."`
	EnvFile string   `help:"File that keeps the token out of the unit (mode 0600)." default:"/etc/skein/service.env"`
}

const unitText = `# Written by 'skein install'.
[Unit]
Description=Skein node
Documentation=man:systemd.service(5)
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
EnvironmentFile=-%s
ExecStart=%s
# A node that is cut off at boot may have to wait long for its cluster, and works meanwhile.
TimeoutStartSec=infinity
Restart=always
RestartSec=1
# Pods, shims and containerd go on while the daemon restarts.
KillMode=process
Delegate=yes
LimitNOFILE=1048576
TasksMax=infinity

[Install]
WantedBy=multi-user.target
`

func (i *installCmd) Run() error {
	args := i.Args
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		args = []string{"up"}
	}
	if args[0] != "up" && args[0] != "join" {
		return fmt.Errorf("install: the service runs 'up' or 'join', not %q", args[0])
	}
	if os.Geteuid() != 0 {
		return errors.New("install: writing a system service needs root")
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	for _, name := range []string{"skein", "skein-helper"} {
		if err := copyExecutable(filepath.Join(filepath.Dir(self), name), filepath.Join(i.Bin, name)); err != nil {
			return fmt.Errorf("install: %w", err)
		}
	}
	args, token := takeToken(args)
	if token != "" {
		if err := writeFile(i.EnvFile, []byte("SKEIN_TOKEN="+token+"\n"), 0o600); err != nil {
			return fmt.Errorf("install: %w", err)
		}
	}
	line := filepath.Join(i.Bin, "skein")
	for _, a := range args {
		line += " " + systemdQuote(a)
	}
	if err := writeFile(i.Unit, fmt.Appendf(nil, unitText, i.EnvFile, line), 0o644); err != nil {
		return fmt.Errorf("install: %w", err)
	}
	fmt.Println("wrote", i.Unit)
	if i.NoNow {
		return nil
	}
	for _, c := range [][]string{{"daemon-reload"}, {"enable", "--now", filepath.Base(i.Unit)}} {
		if out, err := exec.Command("systemctl", c...).CombinedOutput(); err != nil {
			return fmt.Errorf("install: systemctl %s: %w: %s", strings.Join(c, " "), err, bytes.TrimSpace(out))
		}
	}
	fmt.Println("skein runs; 'journalctl -u skein' shows its log, 'skein status' its health")
	return nil
}

// takeToken removes --token from the arguments, so that it does not stand in a unit file that everybody may read.
func takeToken(args []string) (rest []string, token string) {
	for i := 0; i < len(args); i++ {
		if v, ok := strings.CutPrefix(args[i], "--token="); ok {
			token = v
		} else if args[i] == "--token" && i+1 < len(args) {
			token = args[i+1]
			i++
		} else {
			rest = append(rest, args[i])
		}
	}
	return rest, token
}

// systemdQuote quotes one word of ExecStart= (systemd.service(5), "Command lines"): % and $ are doubled.
func systemdQuote(s string) string {
	s = strings.NewReplacer("%", "%%", "$", "$$").Replace(s)
	if s == "" || strings.ContainsAny(s, " \t\"'\\;") {
		return strconv.Quote(s)
	}
	return s
}

// copyExecutable replaces dst by a copy of src, atomically: a running dst goes on with its old contents.
func copyExecutable(src, dst string) error {
	if a, err := os.Stat(src); err == nil {
		if b, err := os.Stat(dst); err == nil && os.SameFile(a, b) {
			return nil
		}
	}
	b, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	return writeFile(dst, b, 0o755)
}

// writeFile writes a file beside its place and renames it into it.
func writeFile(path string, b []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
