package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// volumesYAML is a class of local volumes, two of them on two nodes, and a StatefulSet whose pods each write who they are.
const volumesYAML = `apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: disks}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
---
%s
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: disk}
spec:
  serviceName: disk
  replicas: 2
  selector: {matchLabels: {app: disk}}
  template:
    metadata: {labels: {app: disk}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {fsGroup: 4321}
      containers:
      - name: c
        image: "skein.local/tools:1"
        imagePullPolicy: IfNotPresent
        env: [{name: UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}]
        command: [sh, -c, "echo $UID >> /data/pods; cat /data/pods; exec sleep 10000"]
        volumeMounts: [{name: data, mountPath: /data}]
        securityContext: {runAsUser: 1234}
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {storageClassName: disks, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
`

const volumeYAML = `apiVersion: v1
kind: PersistentVolume
metadata: {name: disk-%[1]s}
spec:
  storageClassName: disks
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: %[2]s}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%[1]s]}]}]}}
---
`

// volumes: pods go where their disks are, and find there what was written before.
func (w *world) volumes(t *testing.T) {
	k := w.on("n1")
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o755)) // the pods' user must get through
	must(t, os.Chmod(dir, 0o755))
	var volumes string
	for _, node := range []string{"n2", "n4"} {
		path := filepath.Join(dir, node)
		must(t, os.Mkdir(path, 0o700))
		volumes += fmt.Sprintf(volumeYAML, node, path)
	}
	w.apply(t, "n3", fmt.Sprintf(volumesYAML, volumes))
	pods, _ := w.awaitPods(t, "n1", "app=disk", 2, 60*time.Second)
	on, uids := map[string]string{}, map[string]string{}
	for _, p := range pods {
		on[p.Name], uids[p.Name] = p.Spec.NodeName, string(p.UID)
	}
	if on["disk-0"] == on["disk-1"] || on["disk-0"] != "n2" && on["disk-0"] != "n4" || on["disk-1"] != "n2" && on["disk-1"] != "n4" {
		t.Fatalf("pods on %v, the disks are on n2 and n4", on)
	}
	t.Run("a new pod finds the data", func(t *testing.T) {
		w.do(t, "n2", "delete", "pod/disk-0")
		eventually(t, 60*time.Second, "the new pod reads what the old one wrote", func() error {
			p, err := k.CoreV1().Pods("default").Get(background, "disk-0", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if string(p.UID) == uids["disk-0"] || !podReady(p) {
				return fmt.Errorf("pod %s is %s", p.UID, p.Status.Phase)
			}
			if p.Spec.NodeName != on["disk-0"] {
				t.Fatalf("it is on %s, its disk on %s", p.Spec.NodeName, on["disk-0"])
			}
			out, err := w.cli("n3", "logs", "disk-0")
			if want := uids["disk-0"] + "\n" + string(p.UID); err != nil || strings.TrimSpace(out) != want {
				return fmt.Errorf("it reads %q, want %q, %v", out, want, err)
			}
			return nil
		})
	})
	t.Run("a claim in use stays", func(t *testing.T) {
		must(t, k.CoreV1().PersistentVolumeClaims("default").Delete(background, "data-disk-1", metav1.DeleteOptions{}))
		w.do(t, "n2", "delete", "statefulset/disk")
		phases := func() (string, error) {
			claims, err := k.CoreV1().PersistentVolumeClaims("default").List(background, metav1.ListOptions{})
			if err != nil {
				return "", err
			}
			volumes, err := k.CoreV1().PersistentVolumes().List(background, metav1.ListOptions{})
			if err != nil {
				return "", err
			}
			var all []string
			for _, c := range claims.Items {
				all = append(all, c.Name+" "+string(c.Status.Phase))
			}
			for _, v := range volumes.Items {
				all = append(all, v.Name+" "+string(v.Status.Phase))
			}
			return strings.Join(all, ", "), nil
		}
		released, kept := "disk-"+on["disk-1"], "disk-"+on["disk-0"]
		eventually(t, 30*time.Second, "it goes with its pod, and its volume is released", func() error {
			got, err := phases()
			if err != nil || strings.Contains(got, "data-disk-1") || !strings.Contains(got, released+" Released") || !strings.Contains(got, kept+" Bound") || !strings.Contains(got, "data-disk-0 Bound") {
				return fmt.Errorf("%s, %v", got, err)
			}
			return nil
		})
	})
	t.Run("a volume that cannot be mounted", func(t *testing.T) {
		must(t, os.RemoveAll(filepath.Join(dir, on["disk-0"])))
		w.apply(t, "n2", `apiVersion: v1
kind: Pod
metadata: {name: broken}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: "skein.local/tools:1", imagePullPolicy: IfNotPresent, command: [sleep, "1000"], volumeMounts: [{name: v, mountPath: /data}]}]
  volumes: [{name: v, persistentVolumeClaim: {claimName: data-disk-0}}]
`)
		eventually(t, 30*time.Second, "an event says why", func() error {
			events, err := k.CoreV1().Events("default").List(background, metav1.ListOptions{FieldSelector: "involvedObject.name=broken,reason=FailedMount"})
			if err != nil {
				return err
			}
			for _, e := range events.Items {
				if e.Type == corev1.EventTypeWarning && strings.Contains(e.Message, `MountVolume.SetUp failed for volume "v" : local volume: stat`) {
					return nil
				}
			}
			return fmt.Errorf("%d events", len(events.Items))
		})
		w.do(t, "n2", "delete", "pod/broken")
	})
	w.do(t, "n2", "delete", "pvc/data-disk-0", "pv/disk-n2", "pv/disk-n4", "storageclass/disks")
}
