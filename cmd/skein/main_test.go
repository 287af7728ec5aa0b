package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// capture runs the command line and returns its exit code and what it said.
func capture(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	dir := t.TempDir()
	files := map[string]*os.File{}
	for _, name := range []string{"out", "err"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[name] = f
	}
	o, e := os.Stdout, os.Stderr
	os.Stdout, os.Stderr = files["out"], files["err"]
	defer func() { os.Stdout, os.Stderr = o, e }()
	code = run(args)
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	return code, read("out"), read("err")
}

// Bad input gets one clear line and a code that is not zero.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	none := filepath.Join(dir, "none")
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"frob"}, 2, "unexpected argument frob"},
		{[]string{"join", "192.0.2.1"}, 2, "--token"},
		{[]string{"join", "192.0.2.1", "--token", "x", "--address", "192.0.2.9", "--state-dir", none}, 1, `not a valid join token`},
		{[]string{"up", "--address", "here"}, 1, "--address"},
		{[]string{"up", "--address", "192.0.2.9", "--pod-cidr", "10.0.0.0"}, 1, "--pod-cidr"},
		{[]string{"up", "--address", "127.0.0.1", "--name", "A_b"}, 1, `node name "a_b"`},
		{[]string{"up", "--profile", "wan"}, 2, "--profile"},
		{[]string{"--config", file("a.yaml", "zonne: x\nbogus: y\n"), "version"}, 2, "unknown key bogus, zonne"},
		{[]string{"--config", file("b.yaml", "zone: ["), "version"}, 2, "b.yaml"},
		{[]string{"--config", none, "version"}, 2, "no such file"},
		{[]string{"members", "--state-dir", none}, 1, "no Skein node runs here"},
		{[]string{"token", "create", "--ttl", "soon"}, 2, "--ttl"},
		{[]string{"members", "--kubeconfig", none}, 1, none},
		{[]string{"images", "import", none}, 1, "no such file"},
		{[]string{"kubeconfig", "--group", "devs"}, 1, "--group is of a --user"},
		{[]string{"kubeconfig", "--user", "jane", "--ttl", "1m"}, 1, "ten minutes to a year"},
		{[]string{"up", "--address", "192.0.2.9", "--state-dir", none, "--audit-log-path", "/x"}, 1, "without a policy"},
		{[]string{"up", "--address", "192.0.2.9", "--state-dir", none, "--authentication-config", file("authn.yaml", "kind: Nonsense\n"),
			"--authorization-config", file("authz.yaml", "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthorizationConfiguration\nauthorizers: [{type: RBAC, name: rbac}]\n")}, 1, "authz.yaml: missing required types: [Node]"},
		{[]string{"up", "--address", "192.0.2.9", "--state-dir", none, "--authentication-config", none}, 1, "authentication configuration " + none},
		{[]string{"up", "--address", "192.0.2.9", "--state-dir", none, "--enable-admission-plugins", "Nonsense"}, 1, `"Nonsense" is unknown`},
		{[]string{"up", "--address", "192.0.2.9", "--state-dir", none, "--max-watches=-1"}, 1, "-1 watches at once"},
		{[]string{"install", "--", "frob"}, 1, `not "frob"`},
	} {
		code, out, errOut := capture(t, c.args...)
		if code != c.code || !strings.Contains(errOut, c.want) || out != "" {
			t.Errorf("%q: exit %d, stderr %q, stdout %q; want exit %d and %q on stderr alone", c.args, code, errOut, out, c.code, c.want)
		}
		if _, err := os.Stat(none); err == nil {
			t.Errorf("%q left %s behind", c.args, none)
		}
	}
}

func TestVersionAndHelp(t *testing.T) {
	if code, out, _ := capture(t, "version"); code != 0 || !strings.HasPrefix(out, "skein v") {
		t.Errorf("version: exit %d, %q", code, out)
	}
	if code, out, _ := capture(t); code != 2 || !strings.Contains(out, "The cluster:") {
		t.Errorf("no arguments: exit %d, %q", code, out)
	}
}

func TestConfigFileSetsFlags(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte("zone: attic\nname: not_valid\naddress: 127.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, errOut := capture(t, "--config", path, "up")
	if !strings.Contains(errOut, `node name "not_valid"`) {
		t.Errorf("the file's name was not used: %q", errOut)
	}
	_, _, errOut = capture(t, "--config", path, "up", "--name", "also_not")
	if !strings.Contains(errOut, `node name "also_not"`) {
		t.Errorf("the flag did not win over the file: %q", errOut)
	}
	if err := os.WriteFile(path, []byte("name: nn\naddress: 192.0.2.9\nbackup: {dir: here, schedule: often}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, errOut = capture(t, "--config", path, "up"); !strings.Contains(errOut, `backup schedule "often"`) {
		t.Errorf("a mapping of the file was not used: %q", errOut)
	}
	if err := os.WriteFile(path, []byte("backup: {dri: here}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, errOut = capture(t, "--config", path, "version"); !strings.Contains(errOut, `unknown key backup-dri`) {
		t.Errorf("a wrong key in a mapping: %q", errOut)
	}
}

// The order is flags, environment, file; a command other than up and join takes from the file where the node is.
func TestConfigPrecedence(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(path, []byte("name: from_file\naddress: 127.0.0.1\nstate-dir: "+dir+"/from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SKEIN_NAME", "from_env")
	if _, _, errOut := capture(t, "--config", path, "up"); !strings.Contains(errOut, `node name "from_env"`) {
		t.Errorf("the environment did not win over the file: %q", errOut)
	}
	if _, _, errOut := capture(t, "--config", path, "up", "--name", "from_flag"); !strings.Contains(errOut, `node name "from_flag"`) {
		t.Errorf("the flag did not win over the environment: %q", errOut)
	}
	if _, _, errOut := capture(t, "--config", path, "members"); !strings.Contains(errOut, "/from-file") {
		t.Errorf("members looks elsewhere than where the file puts the node: %q", errOut)
	}
}

// Every setting of a node can stand in the file.
func TestConfigTakesEveryKey(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(path, []byte(`name: not_valid
state-dir: `+dir+`/none
address: 192.0.2.9
zone: attic
label: {disk: ssd, row: "3"}
voter: never
profile: edge
cri-endpoint: tcp://nowhere
cni-dir: /etc/cni/net.d
cni-bin-dir: /opt/cni/bin
cgroup-root: /
service-cgroup: /x
uplink: eth9
pod-cidr: 10.9.0.0/30
service-cidr: 10.8.0.0/30
cluster-domain: example.org
eviction-grace: -5s
voter-replace-after: 1s
log-level: warn
token: skein1.a.b.c
`), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, errOut := capture(t, "--config", path, "up")
	for _, want := range []string{`"not_valid"`, `"tcp://nowhere"`, `cgroup root "/"`, "10.9.0.0/30", "10.8.0.0/30", "eviction grace -5s", "dead voter after 1s"} {
		if code != 1 || !strings.Contains(errOut, want) {
			t.Errorf("exit %d without %s: %s", code, want, errOut)
		}
	}
}

func TestTakeToken(t *testing.T) {
	for _, args := range [][]string{{"join", "a", "--token", "T", "--zone=x"}, {"join", "a", "--token=T", "--zone=x"}} {
		rest, token := takeToken(args)
		if token != "T" || !reflect.DeepEqual(rest, []string{"join", "a", "--zone=x"}) {
			t.Errorf("%q: got %q and %q", args, rest, token)
		}
	}
}

func TestSystemdQuote(t *testing.T) {
	for in, want := range map[string]string{"up": "up", "": `""`, "a b": `"a b"`, "50%": "50%%", "$x": "$$x", `"`: `"\""`} {
		if got := systemdQuote(in); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
}

// A unit file must not hold the token, which everybody could read there.
func TestInstallKeepsTheTokenApart(t *testing.T) {
	dir := t.TempDir()
	i := installCmd{Args: []string{"--", "join", "192.0.2.1", "--token", "skein1.a.b.c"}, Bin: dir, Unit: dir + "/u", EnvFile: dir + "/e", NoNow: true}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"skein", "skein-helper"} { // install copies them from beside the running executable
		p := filepath.Join(filepath.Dir(self), name)
		if err := os.WriteFile(p, []byte("x"), 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(p)
	}
	if err := i.Run(); err != nil {
		t.Fatal(err)
	}
	unit, _ := os.ReadFile(i.Unit)
	env, _ := os.ReadFile(i.EnvFile)
	if strings.Contains(string(unit), "skein1.") || !strings.Contains(string(unit), "ExecStart="+dir+"/skein join 192.0.2.1\n") {
		t.Errorf("unit:\n%s", unit)
	}
	if string(env) != "SKEIN_TOKEN=skein1.a.b.c\n" {
		t.Errorf("environment file: %q", env)
	}
	if st, err := os.Stat(i.EnvFile); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("environment file has mode %v, %v", st.Mode(), err)
	}
}
