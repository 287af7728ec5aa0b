package cri

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/pelletier/go-toml/v2"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	apitest "k8s.io/cri-api/pkg/apis/testing"

	"skein.io/skein/node/cri/exits"
	"skein.io/skein/node/cri/image"
)

func TestCorrect(t *testing.T) {
	at := time.Unix(1000, 5)
	status := func(code int32, reason string) runtimeapi.ContainerStatus {
		return runtimeapi.ContainerStatus{ExitCode: code, Reason: reason, FinishedAt: 42, Message: "m"}
	}
	for _, c := range []struct {
		name   string
		code   int32
		reason string
		rec    exits.Record
		want   int32
		why    string
		moved  bool
	}{
		{"lost zero", 255, "Unknown", exits.Record{Status: 0, At: at}, 0, "Completed", true},
		{"lost seven", 255, "Unknown", exits.Record{Status: 7, At: at}, 7, "Error", true},
		{"lost oom", 255, "Unknown", exits.Record{Status: 137, At: at, OOM: true}, 137, "OOMKilled", true},
		{"lost code, oom event came late", 255, "OOMKilled", exits.Record{Status: 137, At: at, OOM: true}, 137, "OOMKilled", true},
		{"lost oom event", 137, "Error", exits.Record{Status: 137, At: at, OOM: true}, 137, "OOMKilled", false},
		{"a child ran out of memory, the container ended well", 0, "Completed", exits.Record{Status: 0, At: at, OOM: true}, 0, "Completed", false},
		{"nothing lost", 7, "Error", exits.Record{Status: 7, At: at}, 7, "Error", false},
		{"it really ended with 255", 255, "Error", exits.Record{Status: 255, At: at}, 255, "Error", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := status(c.code, c.reason)
			correct(&st, c.rec)
			if st.ExitCode != c.want || st.Reason != c.why || (st.FinishedAt == at.UnixNano()) != c.moved || (st.Message == "") != c.moved {
				t.Errorf("got %d %s at %d %q", st.ExitCode, st.Reason, st.FinishedAt, st.Message)
			}
		})
	}
}

func TestRuntimeCorrectsAndForgets(t *testing.T) {
	dir := t.TempDir()
	fake, images := apitest.NewFakeRuntimeService(), apitest.NewFakeImageService()
	rt := newRuntime(fake, images, dir, slog.New(slog.DiscardHandler))
	add := func(id string, state runtimeapi.ContainerState) {
		fake.Containers[id] = &apitest.FakeContainer{ContainerStatus: runtimeapi.ContainerStatus{Id: id, State: state, ExitCode: 255, Reason: "Unknown"}}
	}
	add("ended", runtimeapi.ContainerState_CONTAINER_EXITED)
	add("runs", runtimeapi.ContainerState_CONTAINER_RUNNING)
	add("other", runtimeapi.ContainerState_CONTAINER_EXITED)
	for _, id := range []string{"ended", "runs", "gone"} {
		if err := errors.Join(exits.Write(dir, id, 3, time.Unix(1, 0)), exits.WriteOOM(dir, id)); err != nil {
			t.Fatal(err)
		}
	}
	for id, want := range map[string]int32{"ended": 3, "runs": 255, "other": 255} {
		res, err := rt.ContainerStatus(t.Context(), id, false)
		if err != nil || res.Status.ExitCode != want {
			t.Errorf("%s: %v, %v; want exit code %d", id, res, err, want)
		}
	}
	fake.Sandboxes["s"] = &apitest.FakePodSandbox{}
	if err := rt.RemovePodSandbox(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	ids, err := exits.IDs(dir)
	slices.Sort(ids)
	if err != nil || !slices.Equal(ids, []string{"ended", "runs"}) {
		t.Errorf("kept %v, %v; want the records of known containers", ids, err)
	}
	if err := rt.RemoveContainer(t.Context(), "ended"); err != nil {
		t.Fatal(err)
	}
	if _, err := exits.Read(dir, "ended"); !errors.Is(err, exits.ErrNone) {
		t.Errorf("record of a removed container: %v", err)
	}
}

func TestPauseImageIsNotRemoved(t *testing.T) {
	images := apitest.NewFakeImageService()
	images.SetFakeImages([]string{image.PauseName, "skein.local/web:1"})
	for name, img := range images.Images {
		img.RepoTags = []string{name}
	}
	rt := newRuntime(apitest.NewFakeRuntimeService(), images, "", slog.New(slog.DiscardHandler))
	if err := rt.Images.RemoveImage(t.Context(), &runtimeapi.ImageSpec{Image: image.PauseName}); !errors.Is(err, ErrPinned) {
		t.Errorf("pause image: %v", err)
	}
	if err := rt.Images.RemoveImage(t.Context(), &runtimeapi.ImageSpec{Image: "skein.local/web:1"}); err != nil {
		t.Errorf("another image: %v", err)
	}
}

func TestRenderConfig(t *testing.T) {
	for _, dir := range []string{"/var/lib/skein/containerd", "/a b/" + strings.Repeat("long/", 30)} {
		c := Config{Dir: dir, CgroupRoot: "/skein/n1", Helper: "/opt/skein-helper", Runc: "/usr/sbin/runc", CNIDir: dir + "/cni", LogLevel: "warn"}
		b, err := c.renderConfig(false)
		if err != nil {
			t.Fatal(err)
		}
		var parsed struct {
			Version int
			Root    string
			Imports []string
			Plugins map[string]any
		}
		if err := toml.Unmarshal(b, &parsed); err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		p := c.paths()
		if parsed.Version != 4 || parsed.Root != dir+"/root" || parsed.Imports == nil || len(parsed.Imports) != 0 {
			t.Errorf("parsed %+v", parsed)
		}
		grpc := parsed.Plugins["io.containerd.server.v1.grpc"].(map[string]any)["address"].(string)
		shim := parsed.Plugins["io.containerd.shim.v1.manager"].(map[string]any)["socket_dir"].(string)
		if grpc != p.address || shim != p.shimSockets || len(grpc+".ttrpc") > 107 || len(shim) > maxShimDir {
			t.Errorf("sockets %s (%d), %s (%d)", grpc, len(grpc), shim, len(shim))
		}
		restricted := parsed.Plugins["io.containerd.cri.v1.runtime"].(map[string]any)["restrict_oom_score_adj"]
		if restricted != true {
			t.Errorf("restrict_oom_score_adj %v", restricted)
		}
	}
}

func TestValidateReportsAllFaults(t *testing.T) {
	err := Config{Dir: "relative", CgroupRoot: "x", Program: "/none", Helper: "/none", Runc: "/etc/passwd", CNIDir: "/cni", LogLevel: "loud", LogMaxBytes: 1}.Validate()
	for _, want := range []string{"state directory", "cgroup path", "program to run", HelperName, "runc", "log level", "log size"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name the %s", err, want)
		}
	}
}

func TestMissingRuncSaysWhatToDo(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	c := Config{Dir: "/x", CgroupRoot: "/x"}
	err := c.setDefaults()
	if c.Runc != "" { // installed in one of the other directories
		return
	}
	if !errors.Is(err, ErrNoRunc) || !strings.Contains(err.Error(), "apt-get install runc") {
		t.Errorf("error %v", err)
	}
}

func TestDialSaysWhatToDo(t *testing.T) {
	for endpoint, want := range map[string]string{
		"tcp://127.0.0.1:1":               "unix:///run/containerd",
		"unix://" + t.TempDir() + "/none": "start it, or leave the endpoint out",
	} {
		if _, err := Dial(t.Context(), DialConfig{Endpoint: endpoint}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", endpoint, err, want)
		}
	}
}

func TestNextWait(t *testing.T) {
	var waits []time.Duration
	w := time.Duration(0)
	for range 9 {
		w = nextWait(w, time.Second, 5*time.Second)
		waits = append(waits, w)
	}
	want := []time.Duration{50, 100, 200, 400, 800, 1600, 3200, 5000, 5000}
	for i := range want {
		want[i] *= time.Millisecond
	}
	if !slices.Equal(waits, want) {
		t.Errorf("waits %v, want %v", waits, want)
	}
	if w := nextWait(5*time.Second, time.Hour, 5*time.Second); w != 0 {
		t.Errorf("wait %v after a long life, want none", w)
	}
}

func TestChildEnv(t *testing.T) {
	got := childEnv([]string{"PATH=/usr/bin", "NOTIFY_SOCKET=/x", "HTTPS_PROXY=p", "GOMEMLIMIT=1"}, "/b")
	if want := []string{"HTTPS_PROXY=p", "PATH=/b:/usr/bin"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := childEnv(nil, "/b"); len(got) != 1 || !strings.HasPrefix(got[0], "PATH=/b:/usr/local/sbin:") {
		t.Errorf("without a PATH: %v", got)
	}
}

func TestCanLowerOOMScore(t *testing.T) {
	for status, want := range map[string]bool{
		"Name:\tx\nCapEff:\t000001ffffffffff\n": true,
		"CapEff:\t00000000fEffffff\n":           false,
		"CapEff:\t0000000001000000\n":           true,
		"Name:\tx\n":                            false,
		"CapEff:\tnonsense\n":                   false,
	} {
		if got := canLowerOOMScore(status); got != want {
			t.Errorf("%q: %v", status, got)
		}
	}
}

func TestRotateLog(t *testing.T) {
	dir := t.TempDir()
	c := &Containerd{cfg: Config{LogMaxBytes: 10}, p: paths{log: filepath.Join(dir, "log")}}
	w, err := os.OpenFile(c.p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	rotate := func(add, now, old string) {
		t.Helper()
		if _, err := w.WriteString(add); err != nil {
			t.Fatal(err)
		}
		if err := c.rotateLog(); err != nil {
			t.Fatal(err)
		}
		b, _ := os.ReadFile(c.p.log)
		o, _ := os.ReadFile(c.p.log + ".1")
		if string(b) != now || string(o) != old {
			t.Errorf("log %q, old log %q; want %q, %q", b, o, now, old)
		}
	}
	rotate("12345", "12345", "")
	rotate("678901", "", "2345678901")
	rotate("abc", "abc", "2345678901") // the writer goes on where the file now ends
	if l := lastLine(c.p.log); l != "abc" {
		t.Errorf("last line %q", l)
	}
}

func TestWriteCNI(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cni")
	for _, list := range []string{`{"name":"a"}`, `{"name":"b"}`} {
		if err := WriteCNI(dir, []byte(list)); err != nil {
			t.Fatal(err)
		}
	}
	es, err := os.ReadDir(dir)
	if err != nil || len(es) != 1 {
		t.Fatalf("%v, %v", es, err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, es[0].Name())); string(b) != `{"name":"b"}` {
		t.Errorf("holds %s", b)
	}
	if err := WriteCNI(dir, []byte("no")); err == nil {
		t.Error("what is not JSON was accepted")
	}
}

func TestImportNeedsAnImage(t *testing.T) {
	_, err := ImportImage(context.Background(), (&url.URL{Scheme: "tcp", Host: "x"}).String(), strings.NewReader(""))
	if err == nil || !strings.Contains(err.Error(), "unix://") {
		t.Errorf("error %v", err)
	}
}

func TestRegistries(t *testing.T) {
	r := Registries{Insecure: []string{"10.0.0.1:5000", "plain.example"}, Mirrors: map[string][]string{"docker.io": {"http://m.example:5000", "https://x.example/hub"}, "plain.example": {"http://m"}}}
	if err := r.Validate(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "r")
	for range 2 { // the second replaces the first
		if err := r.write(dir); err != nil {
			t.Fatal(err)
		}
	}
	// As containerd reads them.
	for host, want := range map[string]string{
		"10.0.0.1:5000": "http 10.0.0.1:5000", "plain.example": "http m, http plain.example", "docker.io": "http m.example:5000, https x.example, https registry-1.docker.io",
	} {
		hosts, err := dockerconfig.ConfigureHosts(t.Context(), dockerconfig.HostOptions{HostDir: dockerconfig.HostDirFromRoot(dir)})(host)
		if err != nil {
			t.Fatalf("%s: %v", host, err)
		}
		var got []string
		for _, h := range hosts {
			got = append(got, h.Scheme+" "+h.Host)
		}
		if s := strings.Join(got, ", "); s != want {
			t.Errorf("%s is pulled from %s, want %s", host, s, want)
		}
	}
	bad := Registries{Insecure: []string{"http://a", "a b"}, Mirrors: map[string][]string{"a/b": {"ftp://x"}, "c": nil}, Dir: "relative"}
	err := bad.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{`"http://a"`, `"a b"`, `"a/b"`, "ftp://x", "registry c", "exclude", "absolute"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}
