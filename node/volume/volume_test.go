package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// fakeAPI is source, token store and token issuer.
type fakeAPI struct {
	maps    map[string]*corev1.ConfigMap
	secrets map[string]*corev1.Secret
	claims  map[string]*corev1.PersistentVolumeClaim
	volumes map[string]*corev1.PersistentVolume
	tokens  map[string]*authv1.TokenRequest
	asked   []*authv1.TokenRequest
	fail    error
	now     time.Time
}

func newFake() *fakeAPI {
	return &fakeAPI{maps: map[string]*corev1.ConfigMap{}, secrets: map[string]*corev1.Secret{}, tokens: map[string]*authv1.TokenRequest{}, now: time.Unix(1e9, 0)}
}

func (f *fakeAPI) ConfigMap(_, name string) (*corev1.ConfigMap, error) {
	if m := f.maps[name]; m != nil {
		return m, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "configmaps"}, name)
}

func (f *fakeAPI) Secret(_, name string) (*corev1.Secret, error) {
	if m := f.secrets[name]; m != nil {
		return m, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "secrets"}, name)
}

func (f *fakeAPI) Claim(_, name string) (*corev1.PersistentVolumeClaim, error) {
	if c := f.claims[name]; c != nil {
		return c, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "persistentvolumeclaims"}, name)
}

func (f *fakeAPI) Volume(name string) (*corev1.PersistentVolume, error) {
	if v := f.volumes[name]; v != nil {
		return v, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "persistentvolumes"}, name)
}

func (f *fakeAPI) Token(uid types.UID, key string) *authv1.TokenRequest {
	return f.tokens[string(uid)+key]
}
func (f *fakeAPI) PutToken(uid types.UID, key string, t *authv1.TokenRequest) {
	f.tokens[string(uid)+key] = t
}
func (f *fakeAPI) DeleteTokens(types.UID) { clear(f.tokens) }
func (f *fakeAPI) request(_ context.Context, ns, sa string, r *authv1.TokenRequest) (*authv1.TokenRequest, error) {
	if f.fail != nil {
		return nil, f.fail
	}
	f.asked = append(f.asked, r)
	out := r.DeepCopy()
	out.Status.Token = strings.Repeat("t", len(f.asked)) + ns + sa
	out.Status.ExpirationTimestamp = metav1.NewTime(f.now.Add(time.Duration(*r.Spec.ExpirationSeconds) * time.Second))
	return out, nil
}

func newManager(t *testing.T, f *fakeAPI) *Manager {
	t.Helper()
	m, err := New(Config{Dir: t.TempDir(), Source: f, Tokens: f, RequestToken: f.request, Now: func() time.Time { return f.now }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unmountBelow(m.cfg.Dir) })
	return m
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func pod(vols ...corev1.Volume) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u1", Labels: map[string]string{"a": "b"}}, Spec: corev1.PodSpec{Volumes: vols, Containers: []corev1.Container{{Name: "c"}}}}
}

func read(t *testing.T, parts ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(parts...))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func TestWriteAtomically(t *testing.T) {
	dir := t.TempDir()
	write := func(p Payload) bool {
		t.Helper()
		changed, err := writeAtomically(dir, p, nil, time.Unix(1, 0))
		if err != nil {
			t.Fatal(err)
		}
		return changed
	}
	f := func(s string) File { return File{Data: []byte(s), Mode: 0o640} }
	if !write(Payload{"a": f("1"), "d/b": f("2")}) {
		t.Error("nothing changed at first")
	}
	if write(Payload{"a": f("1"), "d/b": f("2")}) {
		t.Error("changed without a change")
	}
	target, err := os.Readlink(filepath.Join(dir, "a"))
	if err != nil || target != "..data/a" {
		t.Errorf("link: %q %v", target, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "d/b")); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode: %v %v", info, err)
	}
	// A crash after the switch, before the links: the next write makes them.
	if err := os.Remove(filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "..left"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(Payload{"a": f("1"), "d/b": f("2")})
	if got := read(t, dir, "d/b"); got != "2" {
		t.Errorf("link not made again: %s", got)
	}
	if !write(Payload{"a": f("9"), "e": f("3")}) || read(t, dir, "a") != "9" || read(t, dir, "e") != "3" {
		t.Error("change not seen")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 4 { // a, e, ..data, one data directory
		t.Errorf("left: %v", entries)
	}
	for _, bad := range []string{"", "/x", "../x", "a/../../x", "..x", strings.Repeat("n", 300)} {
		if _, err := writeAtomically(dir, Payload{bad: f("")}, nil, time.Unix(1, 0)); !errors.Is(err, errBadPath) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestAtomicReaders reads while the content changes: never a mixture.
func TestAtomicReaders(t *testing.T) {
	dir := t.TempDir()
	set := func(s string) {
		if _, err := writeAtomically(dir, Payload{"a": {Data: []byte(s), Mode: 0o644}, "b": {Data: []byte(s), Mode: 0o644}}, nil, time.Now()); err != nil {
			t.Error(err)
		}
	}
	set("0")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(stop)
		for i := range 200 {
			set(strings.Repeat("x", i+1))
		}
	})
	for reads := 0; ; reads++ {
		select {
		case <-stop:
			wg.Wait()
			return
		default:
		}
		root, err := os.Readlink(filepath.Join(dir, dataLink))
		if err != nil {
			t.Fatalf("no data after %d reads: %v", reads, err)
		}
		a, e1 := os.ReadFile(filepath.Join(dir, root, "a"))
		b, e2 := os.ReadFile(filepath.Join(dir, root, "b"))
		if e1 == nil && e2 == nil && string(a) != string(b) {
			t.Fatalf("a mixture: %d and %d bytes", len(a), len(b))
		}
	}
}

func TestEmptyDir(t *testing.T) {
	needRoot(t)
	m := newManager(t, newFake())
	gid := int64(4321)
	limit := resource.MustParse("1Mi")
	p := pod(corev1.Volume{Name: "d", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		corev1.Volume{Name: "m", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: &limit}}})
	p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
	for range 2 {
		if _, err := m.Setup(t.Context(), p, PodFacts{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []string{"d", "m"} {
		dir := filepath.Join(m.PodDir(p.UID), "volumes/kubernetes.io~empty-dir", n)
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil || st.Mode&0o7777 != 0o2777 || int64(st.Gid) != gid {
			t.Errorf("%s: mode %o, group %d, %v", n, st.Mode&0o7777, st.Gid, err)
		}
	}
	mem := filepath.Join(m.PodDir(p.UID), "volumes/kubernetes.io~empty-dir/m")
	if err := os.WriteFile(filepath.Join(mem, "big"), make([]byte, 2<<20), 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("more than sizeLimit: %v", err)
	}
	if err := m.Teardown(p.UID); err != nil {
		t.Fatal(err)
	}
	if left, _ := mountsBelow(m.cfg.Dir); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
	if _, err := os.Stat(m.PodDir(p.UID)); !os.IsNotExist(err) {
		t.Errorf("directory left: %v", err)
	}
}

func TestSources(t *testing.T) {
	needRoot(t)
	f := newFake()
	m := newManager(t, f)
	f.maps["m"] = &corev1.ConfigMap{Data: map[string]string{"a": "1"}, BinaryData: map[string][]byte{"b": {0, 1}}}
	f.secrets["s"] = &corev1.Secret{Data: map[string][]byte{"pw": []byte("hush")}}
	yes, mode := true, int32(0o400)
	p := pod(
		corev1.Volume{Name: "cm", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "m"}}}},
		corev1.Volume{Name: "none", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "no"}, Optional: &yes}}},
		corev1.Volume{Name: "pr", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{DefaultMode: &mode, Sources: []corev1.VolumeProjection{
			{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}, Items: []corev1.KeyToPath{{Key: "pw", Path: "x/y"}}}},
			{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}},
				{Path: "cpu", ResourceFieldRef: &corev1.ResourceFieldSelector{ContainerName: "c", Resource: "limits.cpu", Divisor: resource.MustParse("1m")}}}}},
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}},
		}}}})
	if _, err := m.Setup(t.Context(), p, PodFacts{Allocatable: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1500m")}}); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(m.PodDir(p.UID), "volumes")
	for file, want := range map[string]string{"kubernetes.io~configmap/cm/a": "1", "kubernetes.io~configmap/cm/b": "\x00\x01", "kubernetes.io~projected/pr/x/y": "hush",
		"kubernetes.io~projected/pr/labels": `a="b"`, "kubernetes.io~projected/pr/cpu": "1500", "kubernetes.io~projected/pr/token": "tnsdefault"} {
		if got := read(t, dir, file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	if ok, _ := mounted(filepath.Join(dir, "kubernetes.io~projected/pr")); !ok {
		t.Error("a token lies on a disk")
	}
	if info, _ := os.Stat(filepath.Join(dir, "kubernetes.io~projected/pr/x/y")); info.Mode().Perm() != 0o400 {
		t.Errorf("mode %v", info.Mode())
	}
	bad := pod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "m"}, Items: []corev1.KeyToPath{{Key: "zz", Path: "z"}}}}},
		corev1.Volume{Name: "w", VolumeSource: corev1.VolumeSource{ISCSI: &corev1.ISCSIVolumeSource{}}}, corev1.Volume{Name: "x", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "gone"}}})
	bad.UID = "u2"
	_, err := m.Setup(t.Context(), bad, PodFacts{})
	for _, want := range []string{`volume "v" : configmap references non-existent key: zz`, `volume "w" : this node does not support`, `volume "x" : secrets "gone" not found`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
}

func TestTokenRefresh(t *testing.T) {
	f := newFake()
	m := newManager(t, f)
	hour := int64(3600)
	src := &corev1.ServiceAccountTokenProjection{Audience: "x", ExpirationSeconds: &hour, Path: "t"}
	p := pod()
	p.Spec.ServiceAccountName = "sa"
	get := func() string {
		t.Helper()
		m.mu.Lock()
		m.state(p.UID).wake = time.Time{}
		m.mu.Unlock()
		s, err := m.token(t.Context(), p, src)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if got := get(); got != "tnssa" || f.asked[0].Spec.BoundObjectRef.UID != "u1" || f.asked[0].Spec.Audiences[0] != "x" {
		t.Errorf("%q, %+v", got, f.asked[0].Spec)
	}
	if w := m.pods[p.UID].wake; !w.Equal(f.now.Add(48 * time.Minute)) {
		t.Errorf("to be refreshed at %v, want 80 %% of an hour", w.Sub(f.now))
	}
	f.now = f.now.Add(47 * time.Minute)
	if got := get(); got != "tnssa" || len(f.asked) != 1 {
		t.Errorf("asked again too early: %q", got)
	}
	f.now = f.now.Add(2 * time.Minute)
	f.fail = errors.New("unreachable")
	if got := get(); got != "tnssa" {
		t.Errorf("the older token is not used: %q", got)
	}
	if w := m.pods[p.UID].wake; !w.Equal(f.now.Add(tokenRetry)) {
		t.Errorf("to be tried again in %v", w.Sub(f.now))
	}
	f.fail = nil
	if got := get(); got != "tnssa" {
		t.Errorf("asked again before the pause was over: %q", got)
	}
	f.now = f.now.Add(tokenRetry)
	if got := get(); got != "ttnssa" {
		t.Errorf("not refreshed: %q", got)
	}
	f.fail = errors.New("unreachable")
	if _, err := m.token(t.Context(), p, &corev1.ServiceAccountTokenProjection{Audience: "new"}); err == nil {
		t.Error("no error although there is no token")
	}
}

func TestHostPath(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		kind corev1.HostPathType
		want string
	}{
		{dir, corev1.HostPathDirectory, ""}, {file, corev1.HostPathFile, ""}, {filepath.Join(dir, "x"), corev1.HostPathUnset, ""},
		{filepath.Join(dir, "new/deep"), corev1.HostPathDirectoryOrCreate, ""}, {filepath.Join(dir, "newfile"), corev1.HostPathFileOrCreate, ""}, {"/dev/null", corev1.HostPathCharDev, ""},
		{file, corev1.HostPathDirectory, "is not a directory"}, {dir, corev1.HostPathFile, "is not a file"}, {file, corev1.HostPathSocket, "is not a socket file"},
		{"/dev/null", corev1.HostPathBlockDev, "is not a block device"}, {filepath.Join(dir, "no"), corev1.HostPathDirectory, "no such file"}, {dir, "Odd", "invalid volume type"},
	} {
		err := checkHostPath(&corev1.HostPathVolumeSource{Path: c.path, Type: &c.kind})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s as %q: %v, want %q", c.path, c.kind, err, c.want)
		}
	}
}

func TestSubPath(t *testing.T) {
	needRoot(t)
	m := newManager(t, newFake())
	base := t.TempDir()
	p := pod(corev1.Volume{Name: "h", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: base}}})
	for name, target := range map[string]string{"out": "/etc", "up": "../..", "in": "dir", "abs": base + "/dir"} {
		if err := os.Symlink(target, filepath.Join(base, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(base, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(base, "dir/f"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	mount := &corev1.VolumeMount{Name: "h"}
	for sub, ok := range map[string]bool{"dir": true, "dir/f": true, "in/f": true, "made/deep": true, "out": false, "out/passwd": false, "up": false, "up/x": false, "../x": false, "/etc": false, "dir/f/x": false} {
		got, err := m.HostPath(p, "c", 0, mount, sub)
		if (err == nil) != ok {
			t.Errorf("%s: %q %v", sub, got, err)
		}
		if err == nil && strings.HasSuffix(sub, "/f") && read(t, got) != "content" {
			t.Errorf("%s shows %q", sub, read(t, got))
		}
	}
	if info, err := os.Stat(filepath.Join(base, "made/deep")); err != nil || !info.IsDir() {
		t.Errorf("missing subPath not made: %v", err)
	}
	if _, err := m.HostPath(p, "c", 1, mount, "dir"); err != nil {
		t.Fatal(err)
	}
	// The bind mounts go, what they show stays.
	if err := m.Teardown(p.UID); err != nil {
		t.Fatal(err)
	}
	if _, err := m.HostPath(p, "c", 1, mount, "dir"); err != nil {
		t.Fatal(err)
	}
	if err := RemoveAll(m.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(m.cfg.Dir); !os.IsNotExist(err) {
		t.Errorf("directory left: %v", err)
	}
	if read(t, base, "dir/f") != "content" {
		t.Error("Teardown reached through a mount")
	}
}

func TestTeardownRefusesOddNames(t *testing.T) {
	m := newManager(t, newFake())
	for _, uid := range []types.UID{"", ".", "..", "a/b"} {
		if m.Teardown(uid) == nil {
			t.Errorf("%q accepted", uid)
		}
	}
}

func TestFieldValue(t *testing.T) {
	p := pod()
	p.Annotations = map[string]string{"x/y": "1\n2", "b": `"`}
	f := PodFacts{PodIPs: []string{"10.0.0.1", "fd00::1"}, HostIPs: []string{"192.0.2.1"}, NodeName: "n"}
	for field, want := range map[string]string{"metadata.name": "p", "metadata.uid": "u1", "metadata.labels['a']": "b", "metadata.annotations['x/y']": "1\n2", "metadata.annotations": "b=\"\\\"\"\nx/y=\"1\\n2\"",
		"status.podIP": "10.0.0.1", "status.podIPs": "10.0.0.1,fd00::1", "status.hostIP": "192.0.2.1", "spec.nodeName": "n"} {
		if got, err := FieldValue(p, f, field); err != nil || got != want {
			t.Errorf("%s: %q %v, want %q", field, got, err, want)
		}
	}
	for _, field := range []string{"spec.foo", "metadata.name['x']", ""} {
		if _, err := FieldValue(p, f, field); err == nil {
			t.Errorf("%q accepted", field)
		}
	}
}

func FuzzPath(f *testing.F) {
	for _, s := range []string{"a", "a/b", "../a", "a/../../b", "..data/x", "/", "."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if checkPath(p) != nil {
			return
		}
		joined := filepath.Join("/root/vol", filepath.Clean(p))
		if joined != "/root/vol" && !strings.HasPrefix(joined, "/root/vol/") {
			t.Fatalf("%q leads to %q", p, joined)
		}
	})
}
