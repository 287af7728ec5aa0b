package persistentvolume

import (
	"context"
	"fmt"
	"maps"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

// inTree is the prefix of the names of plugins that upstream had, or has, built in.
const inTree = "kubernetes.io/"

// migrated are the CSI drivers that took over from plugins that were built in;
// the migration is on for good (csi-translation-lib/plugins).
var migrated = map[string]string{
	"kubernetes.io/aws-ebs":         "ebs.csi.aws.com",
	"kubernetes.io/gce-pd":          "pd.csi.storage.gke.io",
	"kubernetes.io/cinder":          "cinder.csi.openstack.org",
	"kubernetes.io/azure-disk":      "disk.csi.azure.com",
	"kubernetes.io/azure-file":      "file.csi.azure.com",
	"kubernetes.io/vsphere-volume":  "csi.vsphere.vmware.com",
	"kubernetes.io/portworx-volume": "pxd.portworx.com",
}

// provision asks the class's provisioner for a volume.
func (b *binder) provision(ctx context.Context, claim *corev1.PersistentVolumeClaim, className string) error {
	class, err := b.classLister.Get(className)
	if err != nil {
		b.events.Event(claim, corev1.EventTypeWarning, reasonProvisioningFailed, err.Error())
		return nil // the class wakes the claim when it comes
	}
	provisioner := class.Provisioner
	if driver, ok := migrated[provisioner]; ok {
		provisioner = driver
	} else if strings.HasPrefix(provisioner, inTree) {
		b.events.Eventf(claim, corev1.EventTypeWarning, reasonProvisioningFailed, "no volume plugin matched name: %s", provisioner)
		return nil
	}
	if claim.Annotations[volumehelpers.AnnStorageProvisioner] != provisioner {
		clone := claim.DeepCopy()
		metav1.SetMetaDataAnnotation(&clone.ObjectMeta, volumehelpers.AnnBetaStorageProvisioner, provisioner)
		metav1.SetMetaDataAnnotation(&clone.ObjectMeta, volumehelpers.AnnStorageProvisioner, provisioner)
		if claim, err = b.updateClaim(ctx, clone); err != nil {
			return err
		}
	}
	b.events.Event(claim, corev1.EventTypeNormal, reasonExternalProvisioning, fmt.Sprintf("Waiting for a volume to be created either by the external provisioner '%s' "+
		"or manually by the system administrator. If volume creation is delayed, please verify that "+
		"the provisioner is running and correctly registered.", provisioner))
	return nil
}

// migratedAnnotations returns the annotations with the right note of which
// driver took over from the plugin that one of keys names (the first that is
// there); nil if they are right, or name none.
func migratedAnnotations(have map[string]string, keys ...string) map[string]string {
	for _, key := range keys {
		plugin, ok := have[key]
		if !ok {
			continue
		}
		want := migrated[plugin]
		if have[volumehelpers.AnnMigratedTo] == want {
			return nil
		}
		out := maps.Clone(have)
		if want == "" {
			delete(out, volumehelpers.AnnMigratedTo)
		} else {
			out[volumehelpers.AnnMigratedTo] = want
		}
		return out
	}
	return nil
}
