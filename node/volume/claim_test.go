package volume

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func claimVolume(readOnly bool) corev1.Volume {
	return corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "c", ReadOnly: readOnly}}}
}

// withClaim makes a claim "c" that is bound to a volume of that source.
func withClaim(source corev1.PersistentVolumeSource) *fakeAPI {
	f := newFake()
	f.claims = map[string]*corev1.PersistentVolumeClaim{"c": {ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "c", UID: "claim"},
		Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv"}, Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound}}}
	f.volumes = map[string]*corev1.PersistentVolume{"pv": {ObjectMeta: metav1.ObjectMeta{Name: "pv"},
		Spec: corev1.PersistentVolumeSpec{ClaimRef: &corev1.ObjectReference{UID: "claim"}, PersistentVolumeSource: source}}}
	return f
}

func TestClaimsOfVolumesOfThisNode(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	f := withClaim(corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: dir}})
	f.volumes["pv"].Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
		MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{"n1"}}}}}}}
	m := newManager(t, f)
	p := pod(claimVolume(false))
	gid := int64(2345)
	p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
	mount := &corev1.VolumeMount{Name: "v", MountPath: "/data"}

	if _, err := m.Setup(t.Context(), p, PodFacts{NodeLabels: map[string]string{corev1.LabelHostname: "n2"}}); err == nil || !strings.Contains(err.Error(), `storage node affinity check failed for volume "pv"`) {
		t.Fatalf("a volume of another node: %v", err)
	}
	here := PodFacts{NodeLabels: map[string]string{corev1.LabelHostname: "n1"}}
	if _, err := m.Setup(t.Context(), p, here); err != nil {
		t.Fatal(err)
	}
	if got, err := m.HostPath(p, "c", 0, mount, ""); err != nil || got != dir {
		t.Errorf("%s, %v", got, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Gid != 2345 || st.Mode&0o2070 != 0o2070 {
		t.Errorf("the pod's group: %d %o, %v", st.Gid, st.Mode, err)
	}
	sub, err := m.HostPath(p, "c", 0, mount, "a/b")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sub, "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	// The claim is being deleted and the daemon starts anew: the pod keeps its volume, a new one does not get it.
	f.claims["c"].DeletionTimestamp = &metav1.Time{}
	m, err = New(m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Setup(t.Context(), p, here); err != nil {
		t.Errorf("a pod that runs: %v", err)
	}
	other := p.DeepCopy()
	other.UID = "u2"
	if _, err := m.Setup(t.Context(), other, here); err == nil || !strings.Contains(err.Error(), "PVC is being deleted") {
		t.Errorf("a pod that comes: %v", err)
	}
	// The data outlives the pod.
	if err := m.Teardown(p.UID); err != nil {
		t.Fatal(err)
	}
	if got := read(t, dir, "a/b/f"); got != "x" {
		t.Errorf("after the pod: %s", got)
	}
	if m.ReadOnly(p, "v") || !m.ReadOnly(pod(claimVolume(true)), "v") {
		t.Error("read-only only if the pod says so")
	}
}

func TestClaimsThatCannotBeMounted(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	local := func(path string) corev1.PersistentVolumeSource {
		return corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: path}}
	}
	directory, block := corev1.HostPathDirectory, corev1.PersistentVolumeBlock
	for name, tc := range map[string]struct {
		f    *fakeAPI
		edit func(*fakeAPI)
		want string
	}{
		"fine":             {withClaim(local(dir)), func(*fakeAPI) {}, ""},
		"no claim":         {withClaim(local(dir)), func(f *fakeAPI) { clear(f.claims) }, `error processing PVC ns/c: persistentvolumeclaims "c" not found`},
		"not bound":        {withClaim(local(dir)), func(f *fakeAPI) { f.claims["c"].Status.Phase = corev1.ClaimPending }, "error processing PVC ns/c: PVC is not bound"},
		"being deleted":    {withClaim(local(dir)), func(f *fakeAPI) { f.claims["c"].DeletionTimestamp = &metav1.Time{} }, "PVC is being deleted"},
		"no volume":        {withClaim(local(dir)), func(f *fakeAPI) { clear(f.volumes) }, `persistentvolumes "pv" not found`},
		"volume of others": {withClaim(local(dir)), func(f *fakeAPI) { f.volumes["pv"].Spec.ClaimRef.UID = "x" }, "PV pv is bound to another claim"},
		"no directory":     {withClaim(local(filepath.Join(dir, "gone"))), func(*fakeAPI) {}, "no such file or directory"},
		"a file":           {withClaim(local(file)), func(*fakeAPI) {}, "is not a directory"},
		"raw block":        {withClaim(local(dir)), func(f *fakeAPI) { f.volumes["pv"].Spec.VolumeMode = &block }, "raw block volume"},
		"a host path of the wrong type": {withClaim(corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: file, Type: &directory}}), func(*fakeAPI) {},
			"is not a directory"},
		"a driver's": {withClaim(corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "h"}}), func(*fakeAPI) {}, "of a kind this node does not support"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.edit(tc.f)
			_, err := newManager(t, tc.f).Setup(t.Context(), pod(claimVolume(false)), PodFacts{})
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %s", err, tc.want)
			}
		})
	}
}

// The claim of an ephemeral volume must be the pod's own.
func TestAnEphemeralVolumeOfAnotherPodIsNotMounted(t *testing.T) {
	f := withClaim(corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: t.TempDir()}})
	p := pod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}})
	f.claims = map[string]*corev1.PersistentVolumeClaim{"p-v": f.claims["c"]}
	m := newManager(t, f)
	if _, err := m.Setup(t.Context(), p, PodFacts{}); err == nil || !strings.Contains(err.Error(), "pod is not owner") {
		t.Errorf("%v", err)
	}
	yes := true
	f.claims["p-v"].OwnerReferences = []metav1.OwnerReference{{UID: p.UID, Controller: &yes}}
	if _, err := m.Setup(t.Context(), p, PodFacts{}); err != nil {
		t.Error(err)
	}
}

// mount(8) is called as kubelet does; a stand-in notes how, as the test has no server.
func TestExportsAreMounted(t *testing.T) {
	bin := t.TempDir()
	script := "#!/bin/sh\necho \"$@\" >> " + bin + "/calls\n[ ! -e " + bin + "/fail ] || { echo 'access denied' >&2; exit 32; }\n"
	if err := os.WriteFile(filepath.Join(bin, "mount"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	f := withClaim(corev1.PersistentVolumeSource{NFS: &corev1.NFSVolumeSource{Server: "fd00::1", Path: "/x", ReadOnly: true}})
	f.volumes["pv"].Spec.MountOptions = []string{"nolock"}
	m := newManager(t, f)
	p := pod(claimVolume(false), corev1.Volume{Name: "w", VolumeSource: corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{Server: "store", Path: "/y"}}})
	if _, err := m.Setup(t.Context(), p, PodFacts{}); err != nil {
		t.Fatal(err)
	}
	base := filepath.Join(m.PodDir(p.UID), "volumes", "kubernetes.io~nfs")
	want := "-t nfs -o ro,nolock [fd00::1]:/x " + base + "/v\n-t nfs store:/y " + base + "/w\n"
	if got := read(t, bin, "calls"); got != want {
		t.Errorf("called\n%swant\n%s", got, want)
	}
	if !m.ReadOnly(p, "v") || m.ReadOnly(p, "w") {
		t.Error("read-only as the volume says")
	}
	if err := os.WriteFile(filepath.Join(bin, "fail"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Setup(t.Context(), p, PodFacts{}); err == nil || !strings.Contains(err.Error(), "access denied") {
		t.Errorf("a server that refuses: %v", err)
	}
}
